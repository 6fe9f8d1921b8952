"""The forward process and its loss: against diffusers, the definition in float64 and analytic identities."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffmtl_fast.train.denoising import Denoising
from diffmtl_fast.train.errors import UserError

KINDS = ("epsilon", "v_prediction", "sample")
T = 20


def scheduler_of(kind="epsilon", cls=diffusers.DDPMScheduler):
    return cls(T, beta_schedule="squaredcos_cap_v2", prediction_type=kind)


def drawn(device, batch=7, shape=(3, 5, 5)):
    generator = torch.Generator(device).manual_seed(1)
    x0, noise, pred = torch.randn(3, batch, *shape, generator=generator, device=device)
    return x0, noise, pred, torch.randint(T, (batch,), generator=generator, device=device)


def shares(t):
    """α and σ in float64, [B, 1, 1, 1]."""
    signal = scheduler_of().alphas_cumprod.double().to(t.device)[t].view(-1, 1, 1, 1)
    return signal.sqrt(), (1 - signal).sqrt()


def plain_target(kind, x0, noise, t):
    alpha, sigma = shares(t)
    return {"epsilon": noise.double(), "v_prediction": alpha * noise - sigma * x0, "sample": x0.double()}[
        kind
    ]


@pytest.mark.parametrize("batch", [1, 7, 33])
def test_noisy_images_are_those_of_diffusers(device, batch):
    x0, noise, _, t = drawn(device, batch)
    scheduler = scheduler_of()
    found = Denoising(scheduler, device).add_noise(x0, noise, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scheduler.add_noise(x0, noise, t))


def test_the_process_is_the_schedule_of_alphas_cumprod(device):
    """Also of a scheduler whose own ``add_noise`` scales x_t by 1 / α, which it undoes when it samples."""
    x0, noise, _, t = drawn(device)
    found, expected = (
        Denoising(scheduler_of(cls=cls), device).add_noise(x0, noise, t)
        for cls in (diffusers.EulerDiscreteScheduler, diffusers.DDPMScheduler)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_definition(device, kind, weighted, dtype):
    x0, noise, pred, t = drawn(device)
    pred = pred.to(dtype).requires_grad_()
    weights = torch.linspace(0.0, 2.0, T, device=device) if weighted else None
    found = Denoising(scheduler_of(kind), device, weights).loss(pred, x0, noise, t)
    exact = pred.detach().double().requires_grad_()
    expected = (exact - plain_target(kind, x0, noise, t)).square().mean((1, 2, 3))
    if weights is not None:
        expected = expected * weights[t]
    torch.testing.assert_close(found, expected.float())
    assert found.dtype == torch.float32
    factor = torch.arange(1.0, 8.0, device=device)  # a loss weight that differs by sample, as clusters have
    (grad,) = torch.autograd.grad((found * factor).sum(), pred)
    (expected_grad,) = torch.autograd.grad((expected * factor).sum(), exact)
    torch.testing.assert_close(grad, expected_grad.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_undoing_the_noise_costs_nothing(device, kind):
    """What the model should have said, by the inverse of each parametrisation, has loss 0; nothing else has."""
    x0, noise, _, _ = drawn(device)
    t = torch.arange(3, 17, 2, device=device)
    denoising = Denoising(scheduler_of(kind), device)
    noisy = denoising.add_noise(x0, noise, t).double()
    alpha, sigma = shares(t)
    right = {
        "epsilon": (noisy - alpha * x0) / sigma,
        "v_prediction": (alpha * noisy - x0) / sigma,
        "sample": (noisy - sigma * noise) / alpha,
    }[kind].float()
    assert (denoising.loss(right, x0, noise, t) < 1e-9).all()
    torch.testing.assert_close(
        denoising.loss(right + 0.5, x0, noise, t), torch.full((7,), 0.25, device=device)
    )


def test_prediction_types(device):
    with pytest.raises(UserError, match=r"prediction_type: expected epsilon, v_.* or sample, found 'flow'"):
        Denoising(scheduler_of("flow"), device)
