"""denoising_loss and sample_huber against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast import ops

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(5,), (3, 7), (4, 3, 5, 6)]


def targets(x0, noise, alpha, sigma):
    column = (-1, *[1] * (x0.dim() - 1))
    alpha, sigma = alpha.view(column), sigma.view(column)
    return {"epsilon": noise, "x0": x0, "v": alpha * noise - sigma * x0, "velocity": noise - x0}


def by_hand(pred, target, weight, delta):
    if delta is None:
        elements = (pred - target) ** 2
    else:
        elements = torch.nn.functional.huber_loss(pred, target, reduction="none", delta=delta)
    return elements.reshape(len(pred), -1).mean(1) * weight


@pytest.mark.parametrize("delta", [None, 0.7])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "velocity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_denoising_loss(shape, dtype, prediction, delta, generator, device):
    pred, x0, noise = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    t = torch.rand(shape[0], generator=generator, device=device, dtype=torch.float64) * 1.5
    alpha, sigma = t.cos(), t.sin()
    weight = torch.rand(shape[0], generator=generator, device=device)
    pred.requires_grad_()
    found = ops.denoising_loss(
        pred,
        x0,
        noise,
        prediction=prediction,
        alpha=alpha if prediction == "v" else None,
        sigma=sigma if prediction == "v" else None,
        weight=weight,
        huber_delta=delta,
    )
    exact = pred.detach().double().requires_grad_()
    target = targets(x0.double(), noise.double(), alpha, sigma)[prediction]
    expected = by_hand(exact, target, weight.double(), delta)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((found.double() - expected).norm() / expected.norm()).item() < min(DTYPES[dtype], 1e-6)

    upstream = torch.rand(shape[0], generator=generator, device=device, dtype=torch.float64)
    found.backward(upstream.to(found.dtype))
    expected.backward(upstream)
    assert pred.grad.dtype == dtype
    assert ((pred.grad.double() - exact.grad).norm() / exact.grad.norm()).item() < DTYPES[dtype]


def test_huber_of_a_target(generator, device):
    pred, target = (torch.randn(4, 9, generator=generator, device=device) for _ in range(2))
    expected = torch.nn.functional.huber_loss(pred, target, reduction="none", delta=0.5).mean(1)
    torch.testing.assert_close(ops.sample_huber(pred, target, 0.5), expected)


def test_epsilon_is_the_mean_squared_error(generator, device):
    pred, x0, noise = (torch.randn(4, 9, generator=generator, device=device) for _ in range(3))
    found = ops.denoising_loss(pred, x0, noise, prediction="epsilon")
    torch.testing.assert_close(found, ops.sample_mse(pred, noise))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "velocity"])
@pytest.mark.parametrize("seeded", [False, True])
def test_an_empty_batch_is_an_empty_loss(seeded, prediction, device):
    pred = torch.empty(0, 3, device=device, requires_grad=True)
    noise = torch.tensor(1, device=device) if seeded else torch.empty(0, 3, device=device)
    loss = ops.denoising_loss(pred, pred.detach(), noise, prediction=prediction, huber_delta=1.0)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert pred.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "message"), [((), "found a 0-dimensional tensor"), ((2, 0), r"at least one .*, found \[2, 0\]")]
)
def test_refuses_samples_without_elements(shape, message):
    with pytest.raises(ValueError, match=message):
        ops.denoising_loss(torch.zeros(shape), torch.zeros(shape), torch.tensor(1), prediction="epsilon")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prediction": "noise"}, ValueError, "expected 'epsilon', 'x0', 'v' or 'velocity', found 'noise'"),
        ({"prediction": "v"}, ValueError, "alpha, sigma: expected both"),
        (
            {"prediction": "v", "alpha": torch.ones(2), "sigma": torch.ones(3)},
            ValueError,
            r"sigma: expected shape \[2\], or 1 in all other dimensions, found \[3\]",
        ),
        ({"huber_delta": 0.0}, ValueError, "expected a positive number, found 0.0"),
        ({"noise": torch.zeros(2, 4)}, ValueError, r"or a seed, found \[2, 4\]"),
        ({"noise": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "dtype of x0, torch.float32"),
        ({"x0": torch.zeros(2, 3, requires_grad=True)}, ValueError, "x0: expected a constant"),
        ({"weight": torch.ones(3)}, ValueError, r"weight: expected shape \[2\]"),
    ],
)
def test_refuses(change, error, message):
    inputs = {"x0": torch.zeros(2, 3), "noise": torch.zeros(2, 3), "prediction": "epsilon", **change}
    with pytest.raises(error, match=message):
        ops.denoising_loss(torch.zeros(2, 3), **inputs)
