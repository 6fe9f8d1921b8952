"""gram, combine and combine_ against their definitions in float64, of J in one piece and in parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast import ops

SHAPES = [(1, 1), (1, 5), (2, 0), (3, 17), (5, 4097), (64, 33)]
DTYPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def draw(shape, dtype, generator):
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram(shape, dtype, generator):
    jacobian = draw(shape, dtype, generator)
    gramian = ops.gram(jacobian)
    expected = torch.einsum("kp,lp->kl", jacobian.double(), jacobian.double())
    assert gramian.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(gramian, gramian.T)
    scale = expected.diagonal().max().item() if shape[1] else 1.0
    torch.testing.assert_close(gramian.double(), expected, rtol=0, atol=DTYPES[dtype] * scale * 4)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 20, 64, 65])
def test_gram_in_float64(k, dtype, scale, generator):
    scale = 1.0 if dtype == torch.float16 else scale
    parts = [draw((k, n), torch.float64, generator).mul(scale).to(dtype) for n in (3, 0, 1025)]
    gramian = ops.gram(parts, dtype=torch.float64)
    rows = torch.cat(parts, dim=1).double()
    lengths = rows.norm(dim=1)
    assert gramian.dtype == torch.float64
    assert torch.equal(gramian, gramian.T)
    assert ((gramian - rows @ rows.T).abs() <= 1e-14 * lengths.outer(lengths)).all()


def test_gradient_of_a_gramian_in_float64(generator):
    jacobian = draw((3, 5), torch.float32, generator).requires_grad_()
    (found,) = torch.autograd.grad(ops.gram(jacobian, dtype=torch.float64).sum(), jacobian)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 2 * jacobian.detach().sum(0).expand(3, 5))


def test_gram_in_float64_passes_opcheck(device):
    torch.library.opcheck(torch.ops.diffmtl.gram.default, ([torch.randn(3, 5, device=device)], torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(shape, dtype, generator):
    jacobian, weights = draw(shape, dtype, generator), draw(shape[:1], torch.float32, generator)
    direction = ops.combine(jacobian, weights)
    assert direction.dtype == dtype
    expected = (weights.double().unsqueeze(1) * jacobian.double()).sum(0)
    bound = (weights.double().abs().unsqueeze(1) * jacobian.double().abs()).sum(0)
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps)
    assert ((direction.double() - expected).abs() <= 2 * unit * bound + 1e-7 * (unit > 1e-10) * bound).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 17)], ids=str)
def test_gradients_by_finite_differences(shape, generator):
    jacobian = draw(shape, torch.float64, generator).requires_grad_()
    weights = draw(shape[:1], torch.float64, generator).requires_grad_()
    assert torch.autograd.gradcheck(ops.gram, (jacobian,))
    assert torch.autograd.gradcheck(ops.combine, (jacobian, weights))


def test_gram_of_strided_rows(generator):
    jacobian = draw((17, 3), torch.float32, generator).T
    torch.testing.assert_close(ops.gram(jacobian), ops.gram(jacobian.contiguous()))


def test_autocast_changes_nothing(device, generator):
    jacobian, weights = draw((3, 100), torch.float32, generator), draw((3,), torch.float32, generator)
    gramian, direction = ops.gram(jacobian), ops.combine(jacobian, weights)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(ops.gram(jacobian), gramian)
        assert torch.equal(ops.combine(jacobian, weights), direction)


def test_half_precision_accumulates_in_float32(device):
    jacobian = torch.ones(1, 100_000, dtype=torch.float16, device=device)  # the sum is beyond float16's 65504
    assert ops.gram(jacobian).item() == 100_000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gram(torch.zeros(3)), ValueError, r"\[K, P\], found \[3\]"),
        (lambda: ops.gram(torch.zeros(3, 2, dtype=torch.int32)), TypeError, "found torch.int32"),
        (lambda: ops.gram(torch.zeros(3, 2), dtype=torch.float16), ValueError, "found torch.float16"),
        (lambda: ops.combine(torch.zeros(3, 2), torch.zeros(2)), ValueError, r"shape \[3\].*, found \[2\]"),
        (lambda: ops.combine(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)), TypeError, "torch.int64"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- J in parts ----

PART_SHAPES = [(), (7,), (0,), (3, 0), (4, 3, 3), (2, 5, 1, 1), (1,), (4097,), (33, 65)]
PART_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_one_piece(parts):
    return torch.cat([part.double().reshape(len(part), -1) for part in parts], dim=1)


def draw_parts(k, generator, dtypes=PART_DTYPES, shapes=PART_SHAPES):
    return [draw((k, *shape), dtypes[i % len(dtypes)], generator) for i, shape in enumerate(shapes)]


def assert_gramian_of_parts(gramian, parts, rtol):
    rows = in_one_piece(parts)
    lengths = rows.norm(dim=1)
    assert torch.equal(gramian, gramian.T)
    assert ((gramian.double() - rows @ rows.T).abs() <= rtol * lengths.outer(lengths)).all()


def assert_directions(out, parts, weights, before=None):
    """Compare with float64, allowing for sums in float32 and the rounding to the dtype of `out`."""
    for i, (found, part) in enumerate(zip(out, parts, strict=True)):
        terms = weights.double().view(-1, *[1] * found.dim()) * part.double()
        if before is not None:
            terms = torch.cat([terms, before[i].double()[None]])
        expected, size = terms.sum(0), terms.abs().sum(0)
        exact = torch.float64 in (part.dtype, found.dtype)
        bound = torch.finfo(found.dtype).eps * expected.abs() + (1e-14 if exact else 2e-6) * size
        assert found.shape == part.shape[1:]
        assert ((found.double() - expected).abs() <= bound + torch.finfo(found.dtype).smallest_normal).all()


def assert_square(square, out):
    expected = math.fsum(written.double().square().sum().item() for written in out)
    exact = all(written.dtype == torch.float64 for written in out)
    assert square.shape == ()
    assert math.isclose(square.item(), expected, rel_tol=1e-13 if exact else 2e-6)


@pytest.mark.parametrize("k", [1, 2, 5, 9, 20, 65])
def test_parts_of_many_shapes_and_dtypes(k, generator):
    parts, weights = draw_parts(k, generator), draw((k,), torch.float32, generator)
    gramian = ops.gram(parts)
    assert gramian.dtype == torch.float32
    assert_gramian_of_parts(gramian, parts, 2e-6)
    directions = ops.combine(parts, weights)
    assert [d.dtype for d in directions] == [part.dtype for part in parts]
    assert_directions(directions, parts, weights)
    for dtypes in (PART_DTYPES[:1], PART_DTYPES[1:]):
        out = [draw(part.shape[1:], dtypes[i % len(dtypes)], generator) for i, part in enumerate(parts)]
        addresses, before = [written.data_ptr() for written in out], [written.clone() for written in out]
        assert_square(ops.combine_(out, parts, weights), out)
        assert_directions(out, parts, weights)
        for written, old in zip(out, before, strict=True):
            written.copy_(old)
        assert_square(ops.combine_(out, parts, weights, accumulate=True), out)
        assert_directions(out, parts, weights, before)
        assert [written.data_ptr() for written in out] == addresses


def test_one_float64_part_makes_the_sums_float64(generator):
    parts, weights = draw_parts(3, generator, [torch.float64]), draw((3,), torch.float64, generator)
    assert_gramian_of_parts(ops.gram(parts), parts, 1e-14)
    assert_directions(ops.combine(parts, weights), parts, weights)
    mixed = draw_parts(3, generator, [torch.float32, torch.float64])
    assert ops.gram(mixed).dtype == torch.float64
    out = [draw(part.shape[1:], torch.float32, generator) for part in mixed]
    square = ops.combine_(out, mixed, weights)
    assert square.dtype == torch.float64
    assert_square(square, out)
    assert_directions(out, mixed, weights)
    wide = [draw(part.shape[1:], torch.float64, generator) for part in parts]
    assert ops.combine_(wide, draw_parts(3, generator), weights).dtype == torch.float64


def test_one_part_is_the_whole(generator):
    jacobian, weights = draw((5, 3001), torch.float32, generator), draw((5,), torch.float32, generator)
    assert torch.equal(ops.gram([jacobian]), ops.gram(jacobian))
    direction, out = ops.combine(jacobian, weights), torch.empty(3001, device=jacobian.device)
    assert torch.equal(ops.combine([jacobian], weights)[0], direction)
    ops.combine_([out], [jacobian], weights)
    assert torch.equal(out, direction)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 2**31))
def test_parts_add_up_to_the_whole(sizes, k, seed):
    generator = torch.Generator().manual_seed(seed)
    whole, weights = draw((k, sum(sizes)), torch.float64, generator), draw((k,), torch.float64, generator)
    parts = list(whole.split(sizes, dim=1))  # rows that lie far apart
    torch.testing.assert_close(ops.gram(parts), ops.gram(whole), rtol=0, atol=1e-12 * (1 + sum(sizes)))
    torch.testing.assert_close(torch.cat(ops.combine(parts, weights)), ops.combine(whole, weights))


def test_no_rows(device):
    none, weights = [torch.empty(0, 3, 2, device=device)], torch.empty(0, device=device)
    assert ops.gram(none).shape == (0, 0)
    assert (ops.combine(none, weights)[0] == 0).all()
    out = [torch.full((3, 2), 2.0, device=device)]
    assert ops.combine_(out, none, weights, accumulate=True) == 24
    assert ops.combine_(out, none, weights) == 0


def test_each_tensor_is_replaced_or_added_to(generator):
    parts, weights = draw_parts(3, generator, [torch.float32]), draw((3,), torch.float32, generator)
    flags = [i % 2 == 0 for i in range(len(parts))]
    before = [
        torch.full(p.shape[1:], 0.5 * add, device=p.device) for p, add in zip(parts, flags, strict=True)
    ]
    out = [b.clone() if add else torch.full_like(b, math.nan) for b, add in zip(before, flags, strict=True)]
    assert_square(ops.combine_(out, parts, weights, accumulate=flags), out)
    assert_directions(out, parts, weights, before)


@pytest.mark.parametrize("strided", ["both", "out", "jacobian"])
def test_channels_last(strided, generator):
    last = torch.channels_last
    part, weights = draw((3, 4, 2, 5, 7), torch.float32, generator), draw((3,), torch.float32, generator)
    out = torch.empty(4, 2, 5, 7, device=part.device)
    if strided != "jacobian":
        out = out.contiguous(memory_format=last)
    if strided != "out":
        part = torch.stack([row.contiguous(memory_format=last) for row in part.transpose(2, 4)])
        part = part.permute(0, 1, 4, 3, 2)
    strides = out.stride()
    assert_square(ops.combine_([out], [part], weights), [out])
    assert out.stride() == strides
    assert_directions([out], [part], weights)
    assert_gramian_of_parts(ops.gram([part]), [part], 2e-6)
    assert_directions(ops.combine([part], weights), [part], weights)


def test_rows_are_taken_as_they_lie(generator):
    rows = draw((3, 2, 5, 7, 4), torch.float32, generator).permute(
        0, 1, 4, 2, 3
    )  # [3, 2, 4, 5, 7], channels last
    assert ops.combine([rows], torch.ones(3, device=rows.device))[0].stride() == rows.stride()[1:]


def test_out_with_gaps_is_written_all_the_same(generator):
    part, weights = draw((3, 4, 5), torch.float32, generator), draw((3,), torch.float32, generator)
    for view in (lambda t: t[:, ::2], lambda t: t[:, 1:6], lambda t: t.T[:4, :5]):
        memory = draw((10, 10), torch.float32, generator)
        written = view(memory)[:4, :5]
        before, untouched = written.clone(), memory.clone()
        assert_square(ops.combine_([written], [part], weights, accumulate=True), [written])
        assert_directions([written], [part], weights, [before])
        written.copy_(before)
        assert torch.equal(memory, untouched)


@pytest.mark.parametrize("k", [2, 9, 65])
@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
def test_what_is_not_finite_shows(bad, k, generator):
    parts = draw_parts(k, generator, [torch.float32], [(50,), (3, 4)])
    parts[1][1, 2, 3] = bad
    weights = torch.zeros(k, device=generator.device)
    out = [torch.empty(p.shape[1:], device=p.device) for p in parts]
    assert ops.combine_(out, parts, weights).isnan()  # 0 · ∞ is no number
    assert out[1].isnan().nonzero().tolist() == [[2, 3]]
    assert (out[0] == 0).all()
    assert not ops.gram(parts)[1].isfinite().any() or k > 2
    assert ops.gram(parts)[1, 1].isfinite().item() is False
    weights[0] = bad
    assert not ops.combine_(out, [torch.ones_like(p) for p in parts], weights).isfinite()
    assert not out[0].isfinite().any()


def test_the_norm_is_that_of_the_rounded_values(device):
    out = [torch.empty(1, dtype=torch.float16, device=device)]
    huge = torch.full((2, 1), 6e4, device=device)
    assert ops.combine_(out, [huge], torch.ones(2, device=device)) == math.inf
    assert out[0] == math.inf


def test_gradients_of_parts_by_finite_differences(generator):
    parts = [p.requires_grad_() for p in draw_parts(3, generator, [torch.float64], PART_SHAPES[:6])]
    weights = draw((3,), torch.float64, generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda *parts: ops.gram(parts), parts)
    assert torch.autograd.gradcheck(lambda w, *parts: tuple(ops.combine(parts, w)), (weights, *parts))


def test_in_place_refuses_to_be_differentiated(device):
    for inputs in range(3):
        out, part, weights = (torch.zeros(shape, device=device) for shape in ((4,), (2, 4), (2,)))
        (out, part, weights)[inputs].requires_grad_()
        with pytest.raises(RuntimeError, match="diffmtl::combine_ has no gradient"):
            ops.combine_([out], [part], weights)
        with torch.no_grad():
            ops.combine_([out], [part], weights)


def test_writing_counts_as_a_change(device):
    out, part, weights = (torch.ones(shape, device=device) for shape in ((4,), (2, 4), (2,)))
    factor = torch.ones(4, device=device, requires_grad=True)
    product = (factor * out).sum()
    ops.combine_([out], [part], weights)
    assert out._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        ops.combine_([out], [part], weights)
        ops.combine_([torch.empty(4, device=device)], [part], weights)
    assert out._version == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gram([]), ValueError, "at least one tensor, found an empty sequence"),
        (
            lambda: ops.gram([torch.zeros(())]),
            ValueError,
            r"jacobian\[0\]: expected shape \[K, ...\], found \[\]",
        ),
        (
            lambda: ops.gram([torch.zeros(2, 3), torch.zeros(3, 2)]),
            ValueError,
            r"\[1\].*\[2, ...\].*, found \[3, 2\]",
        ),
        (lambda: ops.gram([torch.zeros(2), torch.zeros(2).int()]), TypeError, r"jacobian\[1\].*torch.int32"),
        (
            lambda: ops.gram([torch.zeros(2), torch.zeros(2, device="meta")]),
            ValueError,
            r"jacobian\[1\]: expected a tensor on cpu, found one on meta",
        ),
        (lambda: ops.combine([torch.zeros(3, 2)], torch.zeros(2)), ValueError, r"shape \[3\].*, found \[2\]"),
        (lambda: ops.combine_([], [torch.zeros(2, 1)], torch.zeros(2)), ValueError, "found 0, 1 and 0"),
        (
            lambda: ops.combine_(
                [torch.zeros(1)], [torch.zeros(2, 1)], torch.zeros(2), accumulate=[True] * 2
            ),
            ValueError,
            "found 1, 1 and 2",
        ),
        (
            lambda: ops.combine_([torch.zeros(2)], [torch.zeros(2, 1)], torch.zeros(2)),
            ValueError,
            r"out\[0\]: expected shape \[1\], found \[2\]",
        ),
        (
            lambda: ops.combine_([torch.zeros(1).int()], [torch.zeros(2, 1)], torch.zeros(2)),
            TypeError,
            r"out\[0\].*torch.int32",
        ),
    ],
)
def test_refuses_parts(call, error, message):
    with pytest.raises(error, match=message):
        call()
