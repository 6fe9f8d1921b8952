"""The backward of normalisations by cluster: against autograd in float64, one cluster at a time."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from diffmtl_fast import ops
from diffmtl_fast.ops import PLAIN

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CLUSTERS = [(1,), (2, 0, 5), (0, 3), (1, 1, 1, 1), (90, 40)]
WIDTHS = [1, 5, 64, 387, 1500]


def by_autograd(grad, x, normalise, weight, bias, bounds):
    """Return the gradients by x, and those by weight and bias of every cluster by itself."""
    parts, by_weight, by_bias = [], [], []
    for begin, end in pairwise(bounds):
        leaves = [t.double().detach().requires_grad_() for t in (x[begin:end], weight, bias)]
        gradients = torch.autograd.grad(
            normalise(*leaves), leaves, grad[begin:end].double(), allow_unused=True
        )
        zeros = torch.zeros_like(leaves[1])
        for into, gradient, missing in zip(
            (parts, by_weight, by_bias), gradients, (leaves[0], zeros, zeros), strict=True
        ):
            into.append(missing if gradient is None else gradient)
    return torch.cat(parts), torch.stack(by_weight), torch.stack(by_bias)


def moments(x, groups, moved=True):
    by_group = x.double().reshape(x.shape[0], groups, -1)
    if not moved:
        return None, (by_group.square().mean(2) + 1e-5).rsqrt()
    return by_group.mean(2), (by_group.var(2, unbiased=False) + 1e-5).rsqrt()


def assert_close(found, exact, dtype):
    scale = max(float(exact.abs().max()), 1.0) if exact.numel() else 1.0
    assert found.shape == exact.shape
    assert (
        float((found.double() - exact).abs().max() if exact.numel() else 0)
        <= 64 * torch.finfo(dtype).eps * scale
    )


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sizes", CLUSTERS, ids=str)
def test_rows(sizes, width, dtype, kind, generator, device):
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    grad, x = (torch.randn(2, sum(sizes), width, generator=generator) + 0.5).to(device, dtype)
    weight, bias = torch.randn(2, width, generator=generator).to(device)

    def normalise(x, weight, bias):
        return (
            F.layer_norm(x, (width,), weight, bias)
            if kind == "layer"
            else F.rms_norm(x, (width,), weight, 1e-5)
        )

    exact = by_autograd(grad, x, normalise, weight, bias, bounds)
    mean, rstd = moments(x, 1, kind == "layer")
    blocks = [torch.full((len(sizes), width), torch.nan, device=device) for _ in range(2)]
    by_weight, by_bias = blocks[0], blocks[1] if kind == "layer" else None
    found = ops.cluster_norm_backward(
        grad, x, mean, rstd, weight, torch.tensor(bounds), by_weight=by_weight, by_bias=by_bias
    )
    assert found.dtype == dtype
    scale = 1 + float(rstd.max())  # a row of one element is divided by √ε
    assert_close(found / scale, exact[0] / scale, dtype)
    assert_close(by_weight, exact[1], torch.float32)
    if by_bias is not None:
        assert_close(by_bias, exact[2], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 1), (6, 5, 7), (32, 8, 8), (4, 2500)], ids=str)
def test_groups(shape, dtype, generator, device):
    groups, bounds = 2, [0, 1, 1, 5]
    grad, x = (torch.randn(2, 5, *shape, generator=generator) + 0.5).to(device, dtype)
    weight, bias = torch.randn(2, shape[0], generator=generator).to(device)
    exact = by_autograd(grad, x, lambda x, w, b: F.group_norm(x, groups, w, b), weight, bias, bounds)
    by_weight, by_bias = torch.full((2, 3, shape[0]), torch.nan, device=device)
    found = ops.cluster_norm_backward(
        grad, x, *moments(x, groups), weight, torch.tensor(bounds), by_weight=by_weight, by_bias=by_bias
    )
    assert_close(found, exact[0], dtype)
    assert_close(by_weight, exact[1], torch.float32)
    assert_close(by_bias, exact[2], torch.float32)


@pytest.mark.parametrize("shape", [(9, 40), (9, 6, 4)], ids=str)
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_into_a_jacobian(out_dtype, moved, shape, generator, device):
    """Any strides and dtype, added or written, one of the two missing; inputs that are no rows of memory."""
    grad, x = torch.randn(2, *reversed(shape), generator=generator).to(device).transpose(1, -1)
    mean, rstd = moments(x, 1, moved)
    weight = torch.randn(2 * shape[1], generator=generator).to(device)[::2]
    wide = [None if t is None else t.double() for t in (grad, x, mean, rstd, weight)]
    start = torch.randn(3, 3 * shape[1] + 1, generator=generator).to(device, out_dtype)
    for offsets in (torch.tensor([0, 4, 4, 9]), torch.tensor([0, 4, 4, 9], device=device)):
        for wanted in ((True, False), (False, True), (True, True), (False, False)):
            for accumulate in ((True, False), (False, True)):
                found, exact = start.clone(), start.double()
                outs = [
                    [view if want else None for want, view in zip(wanted, views, strict=True)]
                    for views in (
                        (j[:, 1 : 1 + shape[1]], j[:, 1 + shape[1] :: 2][:, : shape[1]])
                        for j in (found, exact)
                    )
                ]
                by_x = ops.cluster_norm_backward(
                    grad,
                    x,
                    mean,
                    rstd,
                    weight,
                    offsets,
                    by_weight=outs[0][0],
                    by_bias=outs[0][1],
                    accumulate=accumulate,
                )
                expected = PLAIN["cluster_norm_backward"](*wide, offsets, *outs[1], accumulate)
                torch.testing.assert_close(by_x.double(), expected, rtol=1e-5, atol=1e-5)
                tolerance = 1e-5 + 2 * torch.finfo(out_dtype).eps
                torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)], ids=str)
def test_nothing(shape, device):
    x, offsets = torch.ones(shape, device=device), torch.tensor([0, 0, shape[0]])
    by_weight, by_bias = torch.ones(2, 2, 4, device=device)
    by_x = ops.cluster_norm_backward(
        x, x, *torch.ones(2, shape[0], 1, device=device), None, offsets,
        by_weight=by_weight, by_bias=by_bias, accumulate=(False, True),
    )  # fmt: skip
    assert by_x.shape == shape
    assert not by_weight.any()
    assert (by_bias == 1).all()


def test_what_is_not_finite_stays_in_its_cluster(device):
    grad, x = torch.ones(2, 300, 70, device=device)
    x[130, 3] = torch.inf
    by_weight, by_bias = torch.empty(2, 3, 70, device=device)
    by_x = ops.cluster_norm_backward(
        grad, x, *torch.ones(2, 300, 1, device=device), None, torch.tensor([0, 100, 200, 300]),
        by_weight=by_weight, by_bias=by_bias,
    )  # fmt: skip
    assert by_x.isfinite().all(1).logical_not().nonzero().tolist() == [[130]]
    assert by_weight.isfinite().logical_not().nonzero().tolist() == [[1, 3]]
    assert by_bias.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 4, dtype=torch.float64)}, TypeError, "grad and x of one dtype"),
        ({"x": None}, TypeError, "x: expected a floating-point tensor, found NoneType"),
        ({"mean": torch.ones(2, 2)}, ValueError, r"mean and rstd \[N, G\] = \[2, a divisor of 4\]"),
        ({"mean": None, "rstd": torch.ones(2)}, ValueError, r"a divisor of 4\], found \[2\]"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, "offsets: expected nondecreasing 0 … 2"),
        ({"by_weight": torch.ones(2, 4)}, ValueError, r"by_weight: expected shape \[1, 4\], found \[2, 4\]"),
        ({"by_bias": torch.ones(1, 1).expand(1, 4)}, ValueError, "by_bias: expected memory of its own"),
        ({"by_bias": torch.ones(1, 4, requires_grad=True)}, RuntimeError, "a gradient required by by_bias"),
        ({"x": torch.ones(2, 4, requires_grad=True)}, RuntimeError, "has no gradient: it is itself part"),
    ],
)  # fmt: skip
def test_refuses(change, error, message):
    given = {
        "grad": torch.ones(2, 4),
        "x": torch.ones(2, 4),
        "mean": torch.ones(2, 1),
        "rstd": torch.ones(2, 1),
        "weight": None,
        "offsets": torch.tensor([0, 2]),
    }
    with pytest.raises(error, match=message):
        ops.cluster_norm_backward(**(given | change))
