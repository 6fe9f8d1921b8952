"""Every op under torch.library's own checks and under torch.compile."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast import ops

K, B, P = 3, 6, 10


def mse_inputs(device, dtype, requires_grad):
    pred, target = (torch.randn(B, 2, 5, device=device).to(dtype) for _ in range(2))
    return pred.requires_grad_(requires_grad), target


def parts(device, dtype, requires_grad):
    """A Jacobian in parts, one of them in another dtype."""
    shapes, dtypes = [(K, P), (K,), (K, 2, 3, 1)], [dtype, dtype, torch.float32]
    return [
        torch.randn(shape, device=device).to(t).requires_grad_(requires_grad)
        for shape, t in zip(shapes, dtypes, strict=True)
    ]


def cluster(device):
    return torch.tensor([0, 2, 2, 0, 0, 2], device=device)


def gramian(device, dtype):
    jacobian = torch.randn(K, P, device=device, dtype=dtype)
    return jacobian @ jacobian.T


def offsets(device):
    return torch.tensor([0, 2, 2, B], device=device)


def order(device):
    return torch.tensor([[1, 2], [2, 0], [0, 1]], device=device)


SAMPLES = {
    "sample_mse": lambda d, t, g: mse_inputs(d, t, g),
    "sample_mse_backward": lambda d, t, g: (torch.randn(B, device=d), *mse_inputs(d, t, False)),
    "add_noise": lambda d, t, g: (*mse_inputs(d, t, g), torch.rand(B, device=d), torch.rand(B, device=d)),
    "philox_normal": lambda d, t, g: (torch.tensor(7, device=d), torch.randn(B, 2, 5, device=d).to(t)),
    "sample_loss": lambda d, t, g: (
        *mse_inputs(d, t, g),
        torch.randn(B, 2, 5, device=d).to(t),
        torch.randn(2, B, device=d),
        torch.rand(B, device=d),
        0.5,
    ),
    "sample_loss_backward": lambda d, t, g: (
        torch.randn(B, device=d),
        *mse_inputs(d, t, False),
        torch.randn(B, 2, 5, device=d).to(t),
        torch.randn(2, B, device=d),
        None,
    ),
    "cluster_mean": lambda d, t, g: (torch.randn(B, device=d).to(t).requires_grad_(g), cluster(d), K),
    "cluster_mean_backward": lambda d, t, g: (torch.randn(K, device=d), cluster(d)),
    "cluster_mse": lambda d, t, g: (*mse_inputs(d, t, g), cluster(d), K, torch.rand(B, device=d)),
    "cluster_sum": lambda d, t, g: (torch.randn(B, P, device=d).to(t), offsets(d)),
    "cluster_sum_out": lambda d, t, g: (
        torch.randn(B, P, device=d).to(t),
        offsets(d),
        torch.randn(K, P, device=d),
        True,
    ),
    "cluster_wgrad": lambda d, t, g: (
        torch.randn(B, 4, device=d).to(t),
        torch.randn(B, P, device=d).to(t),
        offsets(d),
    ),
    "cluster_wgrad_out": lambda d, t, g: (
        torch.randn(B, 4, device=d).to(t),
        torch.randn(B, P, device=d).to(t),
        offsets("cpu"),
        torch.randn(K, 4, P, device=d),
        False,
    ),
    "uncertainty_loss": lambda d, t, g: (
        *mse_inputs(d, t, g),
        cluster(d),
        torch.randn(K, device=d).requires_grad_(g),
    ),
    "gram": lambda d, t, g: (parts(d, t, g),),
    "combine": lambda d, t, g: (parts(d, t, g), torch.randn(K, device=d).requires_grad_(g)),
    "combine_": lambda d, t, g: (
        [torch.randn(part.shape[1:], device=d) for part in parts(d, t, False)],
        parts(d, t, False),
        torch.randn(K, device=d),
        [True, False, True],
    ),
    "pcgrad_weights": lambda d, t, g: (
        gramian(d, torch.float32).to(t),
        order(d),
        torch.ones(K, dtype=torch.bool, device=d),
    ),
    "nash_weights": lambda d, t, g: (
        gramian(d, torch.float32).to(t),
        torch.tensor([True, False, True], device=d),
    ),
}


def test_every_op_is_checked():
    names = {name for name in dir(torch.ops.diffmtl) if not name.startswith("_") and name != "name"}
    assert names == set(SAMPLES)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, dtype, requires_grad, device):
    op = getattr(torch.ops.diffmtl, name).default
    torch.library.opcheck(op, SAMPLES[name](device, dtype, requires_grad))


@pytest.mark.compile
def test_compiles_without_graph_breaks(device):
    def objective(pred, target, index, jacobian, gradients):
        losses = ops.cluster_mse(pred, target, index, K) + ops.cluster_mean(
            ops.sample_mse(pred, target), index, K
        )
        weights = ops.nash_weights(ops.gram(jacobian)) + ops.pcgrad_weights(ops.gram(jacobian), order(device))
        norm = ops.combine_(gradients, [jacobian[:, :4], jacobian[:, 4:]], weights, accumulate=[True, False])
        weights = weights + ops.gram([jacobian, jacobian]).diagonal()
        return (
            losses.sum()
            + ops.combine(jacobian, weights).sum()
            + ops.combine([jacobian], weights)[0].sum()
            + norm
        )

    pred, target = mse_inputs(device, torch.float32, True)
    inputs = (pred, target, cluster(device), torch.randn(K, P, device=device))
    written = [[torch.ones(4, device=device), torch.ones(P - 4, device=device)] for _ in range(2)]
    expected = objective(*inputs, written[0])
    (gradient,) = torch.autograd.grad(expected, pred)
    found = torch.compile(objective, fullgraph=True, backend="aot_eager")(*inputs, written[1])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(written[1], written[0])
    torch.testing.assert_close(torch.autograd.grad(found, pred)[0], gradient)


@pytest.mark.compile
def test_ops_that_write_into_their_output_compile(device):
    def gradients(grad_out, x, bounds, jacobian):
        ops.cluster_wgrad(grad_out, x, bounds, out=jacobian[:, : 4 * P].view(K, 4, P), accumulate=True)
        ops.cluster_sum(grad_out, bounds, out=jacobian[:, 4 * P :])
        return jacobian.square().sum() + ops.cluster_wgrad(grad_out, x, bounds).sum()

    for bounds in (offsets(device), offsets("cpu")):
        inputs = (torch.randn(B, 4, device=device), torch.randn(B, P, device=device), bounds)
        expected, found = torch.ones(K, 4 * P + 4, device=device), torch.ones(K, 4 * P + 4, device=device)
        value = gradients(*inputs, expected)
        compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs, found), value)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["cluster_sum", "cluster_wgrad"])
def test_gradients_refuse_to_be_differentiated(name, device):
    gradients, *rest = SAMPLES[name](device, torch.float32, False)
    result = getattr(torch.ops.diffmtl, name)(gradients.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="part of a backward pass"):
        result.sum().backward()


@pytest.mark.parametrize("name", ["pcgrad_weights", "nash_weights"])
def test_weights_refuse_to_be_differentiated(name, device):
    matrix, *rest = SAMPLES[name](device, torch.float32, False)
    weights = getattr(torch.ops.diffmtl, name)(matrix.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="detach the Gramian"):
        weights.sum().backward()
