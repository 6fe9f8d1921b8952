"""cluster_wgrad and cluster_sum against sums of outer products in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rows per cluster: equal, unequal, absent at either end and in the middle, one row each, hundreds.
SIZES = [(4, 4, 4), (7, 1, 12), (0, 5, 0, 3, 0), (1,) * 6, (0,), (130, 300, 37), (33, 33)]


def draw(shape, dtype, generator):
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(dtype)


def offsets_of(sizes, device="cpu"):
    return torch.tensor([0, *sizes], device=device).cumsum(0)


def weight_gradients(grad_out, x, offsets):
    terms = torch.einsum("no,ni->noi", grad_out.double(), x.double())
    return torch.stack([terms[begin:end].sum(0) for begin, end in pairwise(offsets.tolist())])


def sums(values, offsets):
    return torch.stack([values[begin:end].double().sum(0) for begin, end in pairwise(offsets.tolist())])


def assert_close(found, expected, absolute, dtype):
    """Each entry within rounding of the sum of its terms' absolute values; `dtype`: of the products' storage."""
    unit = torch.finfo(dtype).eps + (1e-15 if dtype == torch.float64 else 1e-6)
    tiny = torch.finfo(dtype).smallest_normal  # below it float16 has fewer digits
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= unit * absolute + tiny).all()


def coarsest(*dtypes):
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("width", [(1, 1), (5, 17), (33, 64)], ids=str)
def test_weight_gradients(width, sizes, dtype, generator, device):
    grad_out, x = (draw((sum(sizes), w), dtype, generator) for w in width)
    for offsets in (offsets_of(sizes), offsets_of(sizes, device)):
        found = ops.cluster_wgrad(grad_out, x, offsets)
        assert found.dtype == dtype
        expected = weight_gradients(grad_out, x, offsets)
        assert_close(found, expected, weight_gradients(grad_out.abs(), x.abs(), offsets), dtype)


@pytest.mark.parametrize("rows", [1, 90, 127])
def test_results_that_leave_the_caches(rows, generator, device):
    """Large ones are written past them, from blocks of inputs that a cluster's number of rows decides."""
    sizes = (rows, rows)
    grad_out, x = (draw((2 * rows, w), torch.float32, generator) for w in (192, 800))
    offsets = offsets_of(sizes)
    expected = weight_gradients(grad_out, x, offsets)
    found = ops.cluster_wgrad(grad_out, x, offsets)
    assert_close(found, expected, weight_gradients(grad_out.abs(), x.abs(), offsets), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("width", [0, 1, 17, 1100])
def test_sums(width, sizes, dtype, generator, device):
    values = draw((sum(sizes), width), dtype, generator)
    for offsets in (offsets_of(sizes), offsets_of(sizes, device)):
        found = ops.cluster_sum(values, offsets)
        assert found.dtype == dtype
        assert_close(found, sums(values, offsets), sums(values.abs(), offsets), dtype)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(7, 0, 12), (40, 40, 40)], ids=str)
def test_into_the_columns_of_a_jacobian(sizes, dtype, out_dtype, accumulate, generator):
    offsets = offsets_of(sizes)
    grad_out, x = draw((sum(sizes), 9), dtype, generator), draw((sum(sizes), 20), dtype, generator)
    jacobian = draw((len(sizes), 300), out_dtype, generator)
    before = jacobian.clone()
    weight, bias = jacobian[:, 50:230].view(-1, 9, 20), jacobian[:, 230:239]
    assert ops.cluster_wgrad(grad_out, x, offsets, out=weight, accumulate=accumulate) is weight
    assert ops.cluster_sum(grad_out, offsets, out=bias, accumulate=accumulate) is bias

    stored = coarsest(dtype, out_dtype)
    start = before.double() * accumulate
    expected = start[:, 50:230].view(-1, 9, 20) + weight_gradients(grad_out, x, offsets)
    absolute = start[:, 50:230].view(-1, 9, 20).abs() + weight_gradients(grad_out.abs(), x.abs(), offsets)
    assert_close(weight, expected, absolute, stored)
    expected = start[:, 230:239] + sums(grad_out, offsets)
    assert_close(bias, expected, start[:, 230:239].abs() + sums(grad_out.abs(), offsets), stored)
    untouched = torch.cat([jacobian[:, :50], jacobian[:, 239:]], 1)
    assert torch.equal(untouched, torch.cat([before[:, :50], before[:, 239:]], 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["columns", "transposed", "every_second", "expanded"])
def test_layouts(layout, dtype, generator):
    def view(width):
        if layout == "columns":
            return draw((50, width + 7), dtype, generator)[:, 3 : 3 + width]
        if layout == "transposed":
            return draw((width, 50), dtype, generator).T
        if layout == "every_second":
            return draw((100, 2 * width), dtype, generator)[::2, ::2]
        return draw((1, width), dtype, generator).expand(50, width)

    grad_out, x, offsets = view(6), view(21), offsets_of((13, 30, 7))
    copies = grad_out.contiguous(), x.contiguous()
    out = torch.zeros(3, 21, 6, dtype=dtype, device=generator.device).transpose(1, 2)
    ops.cluster_wgrad(grad_out, x, offsets, out=out)
    absolute = weight_gradients(copies[0].abs(), copies[1].abs(), offsets)
    assert_close(out, weight_gradients(*copies, offsets), absolute, dtype)
    out = torch.zeros(21, 3, dtype=dtype, device=generator.device).T
    ops.cluster_sum(x, offsets, out=out)
    assert_close(out, sums(x, offsets), sums(x.abs(), offsets), dtype)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 70), st.integers(1, 70))
def test_integers_are_summed_exactly(sizes, width_out, width_in):
    generator = torch.Generator().manual_seed(0)
    grad_out, x = (
        torch.randint(-8, 9, (sum(sizes), width), generator=generator).float()
        for width in (width_out, width_in)
    )
    offsets = offsets_of(sizes)
    assert torch.equal(
        ops.cluster_wgrad(grad_out, x, offsets).double(), weight_gradients(grad_out, x, offsets)
    )
    assert torch.equal(ops.cluster_sum(x, offsets).double(), sums(x, offsets))


def test_what_is_not_finite_stays_in_its_cluster(device, generator):
    grad_out, x = draw((9, 4), torch.float32, generator), draw((9, 5), torch.float32, generator)
    grad_out[4, 2], x[8, 3] = float("nan"), float("inf")
    offsets = offsets_of((3, 3, 3), device)
    weights, totals = ops.cluster_wgrad(grad_out, x, offsets), ops.cluster_sum(grad_out, offsets)
    finite = torch.ones(3, 4, 5, dtype=torch.bool)
    finite[1, 2], finite[2, :, 3] = False, False
    assert torch.equal(weights.isfinite().cpu(), finite)
    assert totals.isfinite().logical_not().nonzero().tolist() == [[1, 2]]


def test_half_precision_accumulates_in_float32(device):
    ones = torch.ones(5000, 2, dtype=torch.float16, device=device)  # in float16, 2048 + 1 = 2048
    offsets = torch.tensor([0, 5000], device=device)
    assert (ops.cluster_wgrad(ones, ones, offsets) == 5000).all()
    assert (ops.cluster_sum(ones, offsets) == 5000).all()


def test_autocast_changes_nothing(device, generator):
    grad_out, x = draw((90, 8), torch.float32, generator), draw((90, 9), torch.float32, generator)
    offsets = offsets_of((40, 50))
    expected = ops.cluster_wgrad(grad_out, x, offsets)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(ops.cluster_wgrad(grad_out, x, offsets), expected)


def test_autocast_does_not_change_products_of_many_rows(device, generator):
    """They are PyTorch's, which autocast would give other dtypes, where the result is of another one."""
    grad_out, x = draw((3000, 4), torch.float32, generator), draw((3000, 5), torch.float32, generator)
    offsets, out = offsets_of((1500, 1500)), torch.empty(2, 4, 5, dtype=torch.float64, device=device)
    expected = ops.cluster_wgrad(grad_out, x, offsets, out=out).clone()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(ops.cluster_wgrad(grad_out, x, offsets, out=out), expected)


def test_writing_is_seen_by_autograd(device):
    leaf = torch.ones(1, 2, 3, device=device, requires_grad=True)
    saved = leaf * 2
    loss = saved.square().sum()
    ones = torch.ones(4, 3, device=device)
    with torch.no_grad():
        ops.cluster_wgrad(ones[:, :2], ones, torch.tensor([0, 4]), out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ZEROS, BOUNDS = torch.zeros(4, 3), torch.tensor([0, 1, 4])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.cluster_wgrad(ZEROS.int(), ZEROS, BOUNDS), TypeError, "grad_out: .* found torch.int32"),
        (
            lambda: ops.cluster_wgrad(ZEROS, ZEROS.double(), BOUNDS),
            TypeError,
            "one dtype, found torch.float32",
        ),
        (lambda: ops.cluster_wgrad(ZEROS, ZEROS[:3], BOUNDS), ValueError, r"found \[4, 3\] and \[3, 3\]"),
        (lambda: ops.cluster_wgrad(ZEROS, ZEROS[0], BOUNDS), ValueError, r"found \[4, 3\] and \[3\]"),
        (lambda: ops.cluster_wgrad(ZEROS, ZEROS, BOUNDS.int()), TypeError, "int64, found torch.int32"),
        (lambda: ops.cluster_wgrad(ZEROS, ZEROS, BOUNDS[:1]), ValueError, r"\[K \+ 1\] .* found \[1\]"),
        (lambda: ops.cluster_wgrad(ZEROS, ZEROS, BOUNDS + 1), ValueError, r"0 … 4, found \[1, 2, 5\]"),
        (lambda: ops.cluster_wgrad(ZEROS, ZEROS, BOUNDS[:2]), ValueError, r"0 … 4, found \[0, 1\]"),
        (lambda: ops.cluster_sum(ZEROS, torch.tensor([0, 3, 2, 4])), ValueError, r"found \[0, 3, 2, 4\]"),
        (lambda: ops.cluster_wgrad(ZEROS, ZEROS, BOUNDS, accumulate=True), ValueError, "out to add to"),
        (lambda: ops.cluster_sum(ZEROS, BOUNDS, accumulate=True), ValueError, "out to add to"),
        (lambda: ops.cluster_sum(ZEROS, BOUNDS.to("meta")), ValueError, "or on cpu, found meta"),
        (lambda: ops.cluster_sum(ZEROS[0], BOUNDS), ValueError, r"\[N, D\], found \[3\]"),
        (lambda: ops.cluster_sum(ZEROS, BOUNDS, out=ZEROS), ValueError, r"\[2, 3\], found \[4, 3\]"),
        (
            lambda: ops.cluster_sum(ZEROS, BOUNDS, out=torch.zeros(3).expand(2, 3)),
            ValueError,
            "memory of its own",
        ),
        (lambda: ops.cluster_sum(ZEROS, BOUNDS, out=BOUNDS.expand(2, 3)), TypeError, "out: .* torch.int64"),
        (
            lambda: ops.cluster_sum(torch.ones(4, 3, requires_grad=True), BOUNDS, out=torch.zeros(2, 3)),
            RuntimeError,
            "required by values",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
