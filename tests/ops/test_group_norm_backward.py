"""The backward of group normalisation against autograd in float64."""

import pytest
import torch

from diffmtl_fast import ops
from diffmtl_fast.ops import PLAIN

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 4, 1), (2, 6, 5, 7), (4, 32, 8, 8), (2, 6, 3, 5, 2), (1, 4, 2500), (3, 2)]


def expected(grad, x, groups, weight):
    """Return the gradients by x, and of every sample's own weight and bias."""
    x = x.double().requires_grad_()
    weight = torch.ones(x.shape[1]) if weight is None else weight
    own = weight.double().expand(x.shape[:2]).clone().requires_grad_()
    shift = torch.zeros_like(own, requires_grad=True)
    ones = [1] * (x.dim() - 2)
    mean, rstd = moments(x, groups)
    normal = (x.reshape(*mean.shape, -1) - mean.unsqueeze(2)) * rstd.unsqueeze(2)
    y = normal.view_as(x) * own.reshape(*own.shape, *ones) + shift.reshape(*own.shape, *ones)
    return torch.autograd.grad(y, (x, own, shift), grad.double())


def moments(x, groups):
    by_group = x.double().reshape(x.shape[0], groups, -1)
    return by_group.mean(2), (by_group.var(2, unbiased=False) + 1e-5).rsqrt()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, dtype, weighted, generator, device):
    groups = 1 if shape[1] % 2 else 2
    grad, x = (torch.randn(2, *shape, generator=generator) + 0.5).to(device, dtype)
    weight = torch.randn(shape[1], generator=generator).to(device) if weighted else None
    mean, rstd = moments(x, groups)
    found = ops.group_norm_backward(grad, x, mean, rstd, weight)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in found] == [dtype, wide, wide]
    for result, exact in zip(found, expected(grad, x, groups, weight), strict=True):
        assert result.shape == exact.shape
        scale = max(float(exact.abs().max()), float(grad.abs().max()) * float(rstd.max()))
        error = float((result.double() - exact).abs().max())
        assert error <= 8 * torch.finfo(result.dtype).eps * scale


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)], ids=str)
def test_nothing(shape, device):
    x = torch.ones(shape, device=device)
    by_x, *affine = ops.group_norm_backward(x, x, *torch.ones(2, shape[0], 2, device=device))
    assert by_x.shape == shape
    assert all(t.shape == shape[:2] and not t.any() for t in affine)


@pytest.mark.parametrize("order", [torch.channels_last, "transposed"], ids=str)
def test_layouts(order, generator, device):
    grad, x = torch.randn(2, 3, 4, 5, 6, generator=generator).to(device)
    if order == "transposed":
        other = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (grad, x)]
    else:
        other = [t.contiguous(memory_format=order) for t in (grad, x)]
    for backward in (ops.group_norm_backward, PLAIN["group_norm_backward"]):
        for groups in (1, 2, 4):
            mean, rstd = moments(x, groups)
            expected = backward(grad, x, mean, rstd, None)
            for found, same in zip(backward(*other, mean, rstd, None), expected, strict=True):
                assert found.is_contiguous()
                torch.testing.assert_close(found, same)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 4, 3, dtype=torch.float64)}, TypeError, "grad and x of one dtype"),
        ({"grad": torch.ones(2, 4, 4)}, ValueError, r"grad and x \[N, C, ...\]"),
        ({"mean": torch.ones(2, 3)}, ValueError, r"mean and rstd \[N, G\] = \[2, a divisor of 4\]"),
        ({"rstd": torch.ones(2)}, ValueError, r"mean and rstd"),
        ({"mean": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "mean: expected a floating-point"),
        ({"weight": torch.ones(3)}, ValueError, r"weight: expected shape \[4\], found \[3\]"),
    ],
)
def test_refuses(change, error, message):
    given = {
        "grad": torch.ones(2, 4, 3),
        "x": torch.ones(2, 4, 3),
        "mean": torch.ones(2, 2),
        "rstd": torch.ones(2, 2),
    }
    with pytest.raises(error, match=message):
        ops.group_norm_backward(**(given | change))


def test_what_requires_a_gradient_is_refused_at_the_latest_by_backward():
    x = torch.ones(2, 4, 3, requires_grad=True)  # the second argument: the first alone does not decide
    by_x, _, _ = ops.group_norm_backward(torch.ones(2, 4, 3), x, *torch.ones(2, 2, 2))
    with pytest.raises(RuntimeError, match="group_norm_backward has no gradient"):
        by_x.sum().backward()
