"""cluster_conv_wgrad against autograd of each cluster's convolution in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast import ops
from diffmtl_fast.ops.cpu import layers

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = [(4, 4, 4), (5, 1, 2), (0, 3, 0, 2, 0), (0, 0)]
# inputs, outputs, image, kernel, and what is not the default
GEOMETRIES = [
    (5, 4, (9,), 3, {"padding": 1}),
    (5, 13, (8, 7), 3, {"padding": 1}),
    (19, 17, (4, 4), 1, {}),
    (1, 1, (1, 1), 1, {}),
    (4, 6, (8, 9), 3, {"stride": 2, "padding": 1, "groups": 2}),
    (6, 6, (6, 6), 3, {"padding": 1, "groups": 6}),
    (3, 5, (9, 12), (3, 5), {"stride": (2, 1), "padding": (1, 4), "dilation": (2, 1)}),
    (2, 3, (7, 5), 4, {"stride": 3, "padding": 2}),
    (70, 55, (5, 4), 3, {"padding": 1}),  # several strips of channels and blocks of the others
    (130, 9, (6, 6), 1, {}),
    (40, 40, (5, 5), 3, {"padding": 1, "groups": 2}),
    (3, 20, (13, 12), 12, {"stride": 12}),  # more taps than are arranged at a time
    (17, 5, (12, 13), 12, {"padding": 1}),
    (2, 3, (5, 4), 2, {"stride": 3}),  # some of the input is never read
    (2, 3, (5, 6, 4), 3, {"padding": 1}),
    (2, 4, (5, 6, 7), (2, 3, 1), {"stride": (2, 1, 3), "padding": (1, 0, 0), "groups": 2}),
]


@pytest.fixture(params=["kernel", "library", "groups"])
def way(request, monkeypatch):
    """All ways that the CPU has; in groups where the clusters are of one size."""

    def choose(x, sizes, products, groups):
        fits = len(set(sizes)) == 1 and sizes[0]
        return "kernel" if request.param == "groups" and not fits else request.param

    monkeypatch.setattr(layers, "_conv_way", choose)


def draw(shape, dtype, generator):
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(dtype)


def offsets_of(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def inputs(samples, geometry, dtype, generator):
    """Return the gradient by the output and the input."""
    channels, outputs, image, kernel, options = geometry
    x = draw((samples, channels, *image), dtype, generator)
    widths = [kernel] * len(image) if isinstance(kernel, int) else kernel
    weight = torch.zeros(outputs, channels // options.get("groups", 1), *widths, device=x.device).to(dtype)
    out = CONVOLUTIONS[len(image)](x.new_zeros(1, channels, *image), weight, **options)
    return draw((samples, *out.shape[1:]), dtype, generator), x, weight


def expected(grad_out, x, offsets, weight, options):
    rows = []
    for begin, end in pairwise(offsets.tolist()):
        leaf = torch.zeros_like(weight, dtype=torch.float64, requires_grad=True)
        if begin < end:
            out = CONVOLUTIONS[x.dim() - 2](x[begin:end].double(), leaf, **options)
            rows += torch.autograd.grad(out, leaf, grad_out[begin:end].double())
        else:
            rows.append(leaf.detach())
    return torch.stack(rows)


def assert_close(found, wanted, absolute, *dtypes):
    """Each entry within rounding of the sum of its terms' absolute values."""
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    unit = 2 * unit + (1e-15 if unit < 1e-12 else 1e-6)
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= unit * absolute + 1e-6 * (unit > 1e-4)).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_weight_gradients(geometry, sizes, dtype, generator):
    kernel, options = geometry[3:]
    grad_out, x, weight = inputs(sum(sizes), geometry, dtype, generator)
    offsets = offsets_of(sizes)
    found = ops.cluster_conv_wgrad(grad_out, x, offsets, kernel, **options)
    assert found.dtype == dtype
    absolute = expected(grad_out.abs(), x.abs(), offsets, weight, options)
    assert_close(found, expected(grad_out, x, offsets, weight, options), absolute, dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_the_columns_of_a_jacobian(dtype, out_dtype, accumulate, generator):
    geometry = (3, 5, (6, 7), 3, {"padding": 1})
    grad_out, x, weight = inputs(6, geometry, dtype, generator)
    offsets = offsets_of((3, 0, 2, 1))
    jacobian = draw((4, 300), out_dtype, generator)
    before = jacobian.clone()
    out = jacobian[:, 50:185].view(4, 5, 3, 3, 3)
    found = ops.cluster_conv_wgrad(grad_out, x, offsets, 3, padding=1, out=out, accumulate=accumulate)
    assert found is out
    start = before[:, 50:185].view_as(out).double() * accumulate
    wanted = start + expected(grad_out, x, offsets, weight, {"padding": 1})
    absolute = start.abs() + expected(grad_out.abs(), x.abs(), offsets, weight, {"padding": 1})
    assert_close(out, wanted, absolute, dtype, out_dtype)
    jacobian[:, 50:185] = before[:, 50:185]
    assert torch.equal(jacobian, before)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", ["channels_last", "every_second", "expanded", "out"])
def test_layouts(layout, generator):
    geometry = (20, 6, (8, 8), 3, {"padding": 1})
    grad_out, x, weight = inputs(5, geometry, torch.float32, generator)
    offsets, out = offsets_of((2, 3)), torch.empty(2, 6, 20, 3, 3, device=x.device)
    if layout == "channels_last":
        grad_out, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad_out, x))
    elif layout == "every_second":
        grad_out, x = (t.repeat_interleave(2, 3)[..., ::2] for t in (grad_out, x))
    elif layout == "expanded":
        grad_out = grad_out[:1, :, :1, :1].expand(grad_out.shape)
    else:
        out = torch.empty(2, 3, 3, 20, 6, device=x.device).permute(0, 4, 3, 1, 2)
    ops.cluster_conv_wgrad(grad_out, x, offsets, 3, padding=1, out=out)
    absolute = expected(grad_out.abs(), x.abs(), offsets, weight, {"padding": 1})
    assert_close(out, expected(grad_out, x, offsets, weight, {"padding": 1}), absolute, torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.tuples(st.integers(1, 11), st.integers(1, 14)),
    st.tuples(st.integers(1, 10), st.integers(1, 10)),
    *[st.tuples(st.integers(1, 3), st.integers(1, 3))] * 3,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_integers_are_summed_exactly(sizes, channels, image, kernel, stride, dilation, padding):
    # A kernel that does not fit beside the padding is made to.
    image = [max(i, d * (k - 1) + 1) for i, d, k in zip(image, dilation, kernel, strict=True)]
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    generator = torch.Generator().manual_seed(0)
    grad_out, x, weight = inputs(sum(sizes), (*channels, image, kernel, options), torch.float32, generator)
    grad_out, x = (grad_out * 4).round(), (x * 4).round()
    offsets = offsets_of(sizes)
    found = ops.cluster_conv_wgrad(grad_out, x, offsets, kernel, **options)
    assert torch.equal(found.double(), expected(grad_out, x, offsets, weight, options))


@pytest.mark.usefixtures("way")
def test_what_is_not_finite_stays_in_its_cluster(generator):
    grad_out, x, _ = inputs(6, (3, 4, (5, 5), 3, {"padding": 1}), torch.float32, generator)
    grad_out[2, 1, 4, 4], x[4, 2, 0, 0] = float("nan"), float("inf")
    found = ops.cluster_conv_wgrad(grad_out, x, offsets_of((2, 2, 2)), 3, padding=1)
    finite = found.isfinite().flatten(3).all(3)
    wanted = torch.ones(3, 4, 3, dtype=torch.bool)
    wanted[1, 1], wanted[2, :, 2] = False, False
    assert torch.equal(finite.cpu(), wanted)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("samples", [1, 3, 40])
def test_copies_that_are_made_a_piece_at_a_time(samples, generator):
    """More than the scratch memory holds: clusters are divided, and the pieces added up."""
    geometry = (24, 16, (48, 48), 3, {"padding": 1})
    grad_out, x, weight = inputs(samples, geometry, torch.float32, generator)
    offsets = offsets_of((samples // 3, 0, samples - samples // 3))
    found = ops.cluster_conv_wgrad(grad_out, x, offsets, 3, padding=1)
    absolute = expected(grad_out.abs(), x.abs(), offsets, weight, {"padding": 1})
    assert_close(found, expected(grad_out, x, offsets, weight, {"padding": 1}), absolute, torch.float32)


ZEROS, BOUNDS = torch.zeros(4, 2, 5, 5), torch.tensor([0, 1, 4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_out": ZEROS.int()}, TypeError, "grad_out: .* found torch.int32"),
        ({"x": ZEROS.double()}, TypeError, "one dtype, found torch.float32"),
        ({"x": ZEROS[:3]}, ValueError, r"found \[4, 2, 5, 5\] and \[3, 2, 5, 5\]"),
        ({"x": ZEROS[..., 0]}, ValueError, "one to three spatial dimensions"),
        ({"padding": 0}, ValueError, r"expected \[N, O, \[3, 3\]\] for this x"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size: expected 2 numbers ≥ 1"),
        ({"stride": 0}, ValueError, r"stride: expected 2 numbers ≥ 1, found \[0, 0\]"),
        ({"groups": 3}, ValueError, "a divisor of 2 and 2 channels, found 3"),
        ({"offsets": BOUNDS + 1}, ValueError, r"0 … 4, found \[1, 2, 5\]"),
        ({"accumulate": True}, ValueError, "out to add to"),
        ({"out": torch.zeros(2, 2, 2, 3, 4)}, ValueError, r"out: expected shape \[2, 2, 2, 3, 3\]"),
    ],
    ids=str,
)
def test_bad_inputs(change, error, message):
    given = {"grad_out": ZEROS, "x": ZEROS, "offsets": BOUNDS, "kernel_size": 3, "padding": 1, **change}
    with pytest.raises(error, match=message):
        ops.cluster_conv_wgrad(**given)


def test_a_stride_that_means_nothing(generator):
    """With one output no element is a stride away from another: the copies are as large as the image."""
    x, grad_out = draw((3, 2, 4, 4), torch.float64, generator), draw((3, 5, 1, 1), torch.float64, generator)
    found = ops.cluster_conv_wgrad(grad_out, x, offsets_of((1, 2)), 2, stride=10**7)
    weight = torch.zeros(5, 2, 2, 2, device=x.device)
    wanted = expected(grad_out, x, offsets_of((1, 2)), weight, {"stride": 10**7})
    torch.testing.assert_close(found, wanted)


def test_half_precision_accumulates_in_float32(monkeypatch):
    """Whatever the processor multiplies by itself; sums of float16 would overflow."""
    monkeypatch.setattr(layers, "_library_multiplies", lambda dtype: dtype == torch.float32)
    x = torch.full((4, 1, 8, 8), 40.0, dtype=torch.float16)
    grad_out = x * torch.tensor([1, -1, 1, -1]).view(4, 1, 1, 1)
    assert not ops.cluster_conv_wgrad(grad_out, x, offsets_of((2, 2)), 1).any()


def test_the_way_is_chosen_by_the_work():
    """Narrow groups in one call, of clusters of one size; much of short numbers by the library's instruction."""

    def chosen(sizes, channels, groups=1, products=10**9, dtype=torch.float32):
        return layers._conv_way(torch.empty(sum(sizes), channels, 8, 8, dtype=dtype), sizes, products, groups)

    assert chosen((8, 8), 128) == chosen((7, 9), 128, 8) == "kernel"
    assert chosen((8, 8), 128, 128) == "groups"
    assert chosen((7, 9), 128, 128) == "library"
    assert chosen((7, 9), 128, 128, dtype=torch.float64) == "kernel"
    assert chosen((8, 8), 128, products=10**6, dtype=torch.bfloat16) == "kernel"
    large = chosen((8, 8), 128, dtype=torch.bfloat16)
    assert large == ("library" if layers._library_multiplies(torch.bfloat16) else "kernel")
