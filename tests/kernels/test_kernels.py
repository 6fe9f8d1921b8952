"""Every Triton kernel, through its launcher, against its op's plain definition in float64.

Without a GPU the kernels run in Triton's interpreter, on one it runs them natively. All outputs start as NaN.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton.language as tl

from diffmtl_fast import _host
from diffmtl_fast.kernels import clusters as cluster_kernels
from diffmtl_fast.kernels import settings
from diffmtl_fast.ops import PLAIN, _eigh, _library, cuda
from diffmtl_fast.ops.cuda import launches, layers, uploads

pytestmark = pytest.mark.usefixtures("products_of_bfloat16")

LAUNCHERS = cuda.kernels()
DEVICE = os.environ.get("DIFFMTL_TEST_DEVICE", "cpu")
DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(1, 1), (3, 5, 7), (2, 4096), (5, 4097), (2, 3, 41, 97)]


def draw(shape, dtype, generator):
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def in_float64(x):
    if isinstance(x, list):
        return [in_float64(member) for member in x]
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(name, inputs, tolerance):
    """Compare a launcher with the definition on the same inputs in float64."""
    found = LAUNCHERS[name](*inputs)
    expected = PLAIN[name](*(in_float64(x) for x in inputs))
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple | list) else [(found, expected)]
    for out, reference in pairs:
        assert out.shape == reference.shape
        error = (out.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_errors(shape, dtype, generator, device):
    pred, target = draw(shape, dtype, generator), draw(shape, dtype, generator)
    weight = torch.rand(shape[0], generator=generator, device=device)
    exact = min(DTYPES[dtype], 2e-6)
    check("sample_mse", (pred, target), exact)
    check("sample_mse", (pred, target, weight), exact)
    check("sample_mse_backward", (weight, pred, target), DTYPES[dtype])
    check("sample_mse_backward_both", (weight, pred, target), DTYPES[dtype])
    cluster = torch.arange(shape[0], device=device) * 2 % 3
    check("cluster_mse", (pred, target, cluster, 4, weight), exact)


@pytest.mark.parametrize("delta", [None, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_of_mixed_targets(shape, dtype, delta, generator, device):
    pred, x0, noise = (draw(shape, dtype, generator) for _ in range(3))
    mix = torch.randn(2, shape[0], generator=generator, device=device)
    weight = torch.rand(shape[0], generator=generator, device=device)
    check("sample_loss", (pred, x0, noise, mix, weight, delta), min(DTYPES[dtype], 2e-6))
    check("sample_loss", (pred, x0, None, None, None, delta), min(DTYPES[dtype], 2e-6))
    check("sample_loss_backward", (weight, pred, x0, noise, mix, delta), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_noise(shape, dtype, generator, device):
    x0, noise = draw(shape, dtype, generator), draw(shape, dtype, generator)
    alpha, sigma = torch.rand(2, shape[0], generator=generator, device=device)
    check("add_noise", (x0, noise, alpha, sigma), DTYPES[dtype])
    check("add_noise", (x0, torch.tensor(2**40 + 5, device=device), alpha, sigma), max(DTYPES[dtype], 1e-6))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5, -3])
def test_generated_noise(shape, seed, device):
    check("philox_normal", (torch.tensor(seed, device=device), torch.empty(shape, device=device)), 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_regenerates_the_bits_of_the_noise(shape, generator, device):
    seed, ones = torch.tensor(12345, device=device), torch.ones(shape[0], device=device)
    zeros = torch.zeros(shape, device=device)
    noise = LAUNCHERS["philox_normal"](seed, zeros)
    assert torch.equal(LAUNCHERS["add_noise"](zeros, seed, ones, ones), noise)
    mix = torch.stack([0 * ones, ones])
    assert (LAUNCHERS["sample_loss"](noise, zeros, seed, mix, None, None) == 0).all()
    pred = draw(shape, torch.float32, generator)
    for name, args in (("sample_loss", (None, None)), ("sample_loss_backward", (None,))):
        launch = LAUNCHERS[name]
        scale = (ones,) if name == "sample_loss_backward" else ()
        stored = launch(*scale, pred, zeros, noise, mix, *args)
        assert torch.equal(launch(*scale, pred, zeros, seed, mix, *args), stored)
        stored = launch(*scale, pred, noise, None, None, *args)
        assert torch.equal(launch(*scale, pred, seed, None, None, *args), stored)


def test_a_nan_error_stays_one(device):
    pred = torch.tensor([[float("nan"), 2.0]], device=device)
    grad = LAUNCHERS["sample_loss_backward"](
        torch.ones(1, device=device), pred, torch.zeros_like(pred), None, None, 0.5
    )
    assert grad[0, 0].isnan()
    assert grad[0, 1] == 0.25


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_gradients_keep_the_strides_of_the_prediction(order, generator, device):
    pred = draw((2, 3, 5, 7), torch.float32, generator).contiguous(memory_format=order)
    scale = torch.ones(2, device=device)
    for view in (pred, pred.transpose(0, 1), pred[:, :, ::2]):
        target = draw(view.shape, torch.float32, generator)
        ones = scale if view.shape[0] == 2 else torch.ones(3, device=device)
        grad = LAUNCHERS["sample_mse_backward"](ones, view, target)
        assert grad.stride() == torch.empty_like(view).stride()
        check("sample_mse_backward", (ones, view, target), 2e-6)
        check("sample_mse_backward_both", (ones, view, target), 2e-6)
        check("sample_mse", (view, target), 2e-6)


def test_mixed_dtypes(generator):
    pred, target = draw((3, 100), torch.bfloat16, generator), draw((3, 100), torch.float32, generator)
    check("sample_mse", (pred, target), 2e-6)
    scale = torch.ones(3, device=generator.device)
    assert LAUNCHERS["sample_mse_backward"](scale, pred, target).dtype == torch.bfloat16
    check("sample_mse_backward", (scale, target, pred), 2e-6)
    by_pred, by_target = LAUNCHERS["sample_mse_backward_both"](scale, pred, target)
    assert (by_pred.dtype, by_target.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(by_target, -LAUNCHERS["sample_mse_backward"](scale, pred.float(), target))


@pytest.mark.parametrize("batch", [0, 1, 33, 1500])
@pytest.mark.parametrize("k", [1, 5])
def test_cluster_mean(batch, k, generator, device):
    values = draw((batch,), torch.float32, generator)
    cluster = torch.randint(max(k - 1, 1), (batch,), generator=generator, device=device)
    check("cluster_mean", (values, cluster, k), 1e-6)


@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize(("k", "dtype"), [(1, torch.float32), (5, torch.bfloat16), (7, torch.float64)])
def test_uncertainty_loss(batch, k, dtype, generator, device, monkeypatch):
    monkeypatch.setattr(settings, "sample_block", lambda batch: 16)  # so that 33 samples take three turns
    pred, target = draw((batch, 3), dtype, generator), draw((batch, 3), dtype, generator)
    cluster = torch.randint(max(k - 1, 1), (batch,), generator=generator, device=device)
    log_var, weight = (
        draw((k,), torch.float32, generator),
        torch.rand(batch, generator=generator, device=device),
    )
    for weights in (None, weight):
        check("uncertainty_loss", (pred, target, cluster, log_var, weights), 1e-5)  # terms cancel
    grad, slope = draw((), torch.float64, generator), draw((batch,), torch.float64, generator)
    log_var = log_var.double()
    check("uncertainty_loss_backward", (grad, slope, log_var, log_var, pred, target), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 5, 8, 9, 20, 64])
@pytest.mark.parametrize("size", [0, 1, 130, 4099])
def test_gram_and_combine(k, size, dtype, generator, device):
    jacobian = draw((k, size), dtype, generator)
    weights = torch.randn(k, generator=generator, device=device)
    check("gram", ([jacobian],), min(DTYPES[dtype], 2e-6))
    check("combine", ([jacobian], weights), DTYPES[dtype])
    gramian = LAUNCHERS["gram"]([jacobian])
    assert torch.equal(gramian, gramian.T)


def test_offsets_beyond_32_bits(device):
    # Three rows 2³⁰ elements apart: the last begins at 2³¹. Only the columns in use are ever touched.
    stride = 2**30
    if device.type == "cpu":
        memory = torch.from_numpy(np.empty(2 * stride + 256, dtype=np.float16))
    else:
        memory = torch.zeros(2 * stride + 256, dtype=torch.float16, device=device)
    jacobian = memory.as_strided((3, 256), (stride, 1))
    for k in range(3):
        jacobian[k] = k + 1
    expected = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]], device=device) * 256
    assert torch.equal(LAUNCHERS["gram"]([jacobian]), expected)
    (combined,) = LAUNCHERS["combine"]([jacobian], torch.ones(3, device=device))
    assert (combined == 6).all()
    parts = [jacobian, jacobian[:, :32]]
    assert torch.equal(LAUNCHERS["gram"](parts), expected * 1.125)
    out = [torch.empty(256, device=device), torch.empty(32, device=device)]
    assert LAUNCHERS["combine_"](out, parts, torch.ones(3, device=device), [False, False]) == 36 * 288


# Aligned and not, of several blocks and of none.
PART_SHAPES = [(), (64,), (3, 7), (0,), (16, 272), (4097,), (4, 2, 3, 3)]


def draw_parts(k, dtypes, generator):
    return [draw((k, *shape), dtypes[i % len(dtypes)], generator) for i, shape in enumerate(PART_SHAPES)]


@pytest.mark.parametrize(
    "dtypes",
    [[dtype] for dtype in DTYPES] + [[torch.bfloat16, torch.float32], [torch.float64, torch.float16]],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 3, 9])
def test_a_jacobian_in_parts(k, dtypes, generator, device):
    parts, weights = draw_parts(k, dtypes, generator), torch.randn(k, generator=generator, device=device)
    tolerance = max(DTYPES[dtype] for dtype in dtypes)
    check("gram", (parts,), min(tolerance, 2e-6))
    check("combine", (parts, weights), tolerance)
    gramian = LAUNCHERS["gram"](parts)
    assert torch.equal(gramian, gramian.T)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writing_into_given_tensors(dtype, out_dtype, generator, device):
    parts, weights = draw_parts(3, [dtype], generator), torch.randn(3, generator=generator, device=device)
    out = [draw(part.shape[1:], out_dtype, generator) for part in parts]
    expected = [written.double().clone() for written in out]
    for accumulate in ([True] * len(out), [i % 2 == 0 for i in range(len(out))], [False] * len(out)):
        square = LAUNCHERS["combine_"](out, parts, weights, accumulate)
        PLAIN["combine_"](expected, in_float64(parts), weights.double(), accumulate)
        for found, exact in zip(out, expected, strict=True):
            tolerance = max(DTYPES[out_dtype], 1e-13 if torch.float64 in (dtype, out_dtype) else 2e-6)
            torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=10 * tolerance)
            exact.copy_(found)
        total = sum(found.double().square().sum() for found in out)
        assert abs(square / total - 1) < (1e-13 if torch.float64 in (dtype, out_dtype) else 2e-6)
        assert square.dtype == torch.float64


def test_orders_of_memory(generator, device):
    last = torch.channels_last
    part = draw((3, 4, 5, 6, 2), torch.float32, generator).permute(0, 1, 4, 2, 3)  # channels last
    weights = torch.randn(3, generator=generator, device=device)
    check("gram", ([part, part.contiguous()],), 2e-6)
    check("combine", ([part, part.contiguous()], weights), 2e-6)
    gaps = draw((4, 2, 5, 12), torch.float32, generator)[..., ::2]
    for out in (draw((4, 2, 5, 6), torch.float32, generator).contiguous(memory_format=last), gaps):
        for rows in (part, part.contiguous()):
            before = out.clone()
            square = LAUNCHERS["combine_"]([out], [rows], weights, [True])
            exact = before.double() + torch.tensordot(weights.double(), part.double(), dims=1)
            torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(square, out.double().square().sum())


def test_what_is_not_finite_shows(device):
    parts = [torch.ones(3, 5, device=device), torch.ones(3, 300, device=device)]
    parts[1][2, 123] = float("inf")
    out = [torch.empty(5, device=device), torch.empty(300, device=device)]
    weights = torch.zeros(3, device=device)
    assert LAUNCHERS["combine_"](out, parts, weights, [False, False]).isnan()  # 0 · ∞ is no number
    assert out[1].isnan().nonzero().tolist() == [[123]]
    assert LAUNCHERS["gram"](parts).isinf().nonzero().tolist() == [
        [0, 2],
        [1, 2],
        [2, 0],
        [2, 1],
        [2, 2],
    ]
    weights[0] = float("inf")
    parts[1][2, 123] = 0
    assert LAUNCHERS["combine_"](out, parts, weights, [False, False]).isinf()


def test_nothing_to_write(device):
    empty, weights = [torch.empty(3, 0, device=device)] * 2, torch.ones(3, device=device)
    assert (LAUNCHERS["gram"](empty) == 0).all()
    assert LAUNCHERS["combine_"]([e[0] for e in empty], empty, weights, [True, False]) == 0


def test_a_table_is_made_once(generator, device):
    parts, weights = draw_parts(2, [torch.float32], generator), torch.ones(2, device=device)
    launches._records.cached.cache_clear()
    for _ in range(3):
        LAUNCHERS["gram"](parts)
    assert launches._records.cached.cache_info()[:2] == (
        4,
        2,
    )  # one table of aligned parts, one of the others
    moved = [part.clone() for part in parts]
    check("gram", (moved,), 2e-6)
    assert launches._records.cached.cache_info().misses == 4
    check("combine", (parts, weights), 2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 8, 9, 20])
def test_gram_in_float64(k, dtype, generator):
    scale = 1 if dtype == torch.float16 else 1e30  # products beyond float32
    parts = [draw((k, n), torch.float32, generator).mul(scale).to(dtype) for n in (1, 300, 513)]
    for jacobian in (parts, [parts[1] / scale**2], parts[2:]):
        found = LAUNCHERS["gram"](jacobian, torch.float64)
        assert found.dtype == torch.float64
        check("gram", (jacobian, torch.float64), 1e-14 if k <= 8 or dtype == torch.float64 else 2e-6)


def test_the_squared_norm_of_what_is_written_at_any_scale(generator):
    for scale in (1e-30, 1e30):
        part = draw((3, 1000), torch.float32, generator) * scale
        out = [torch.full((1000,), float("nan"), device=part.device)]
        square = LAUNCHERS["combine_"](out, [part], torch.ones(3, device=part.device), [False])
        torch.testing.assert_close(square, out[0].double().square().sum(), rtol=2e-6, atol=0)


def test_gram_of_strided_rows(generator):
    wide = draw((5, 2, 300), torch.float32, generator)
    check("gram", ([wide[:, 1]],), 2e-6)
    check("gram", ([wide[:, 1].T[:5, :5]],), 2e-6)
    check("combine", ([wide[:, 1].T[:5, :5]], torch.ones(5, device=generator.device)), 2e-6)


# The interpreter takes half a minute for K = 64.
@pytest.mark.parametrize("k", [1, 2, 3, 5, 9] if DEVICE == "cpu" else [1, 2, 3, 5, 9, 20, 64])
def test_weights(k, generator, device):
    jacobian = draw((k, 2 * k), torch.float64, generator)
    jacobian[0] *= 1e4
    jacobian[-1] -= 0.5 * jacobian[0]
    gramian = jacobian @ jacobian.T
    order = torch.rand(k, k, generator=generator, device=device).fill_diagonal_(2).argsort(1)[:, : k - 1]
    present = torch.arange(k, device=device) != k // 2
    for mask in (present, torch.ones_like(present)):
        check("pcgrad_weights", (gramian, order, mask), 1e-12)
        check("nash_weights", (gramian, mask), 1e-8)
        if k % 2:  # what stands in the rows of absent clusters, and the scale, change nothing
            far = torch.where(mask.outer(mask), gramian * 2.0**900, float("nan"))
            for name, rest in (("pcgrad_weights", (order, mask)), ("nash_weights", (mask,))):
                expected = PLAIN[name](gramian, *rest)
                found = LAUNCHERS[name](far, *rest)
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
        found = LAUNCHERS["nash_weights"](gramian.float(), mask)
        torch.testing.assert_close(found, PLAIN["nash_weights"](gramian.float(), mask), rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [1, 2, 5, 8, 13] if DEVICE == "cpu" else [1, 2, 5, 8, 13, 20, 64])
def test_eigenvalues(k, generator, device):
    rows = draw((k, 2 * k), torch.float64, generator)
    rows[0] *= 1e4
    repeated = torch.eye(k, dtype=torch.float64, device=device) + (rows[:, :1] @ rows[:, :1].T)
    equal = torch.ones_like(repeated)
    for matrix in (rows @ rows.T, repeated, equal, equal * 0, -equal):
        values, vectors = LAUNCHERS["eigh"](matrix)
        largest = matrix.norm()
        assert (values - torch.linalg.eigvalsh(matrix)).abs().max() <= 1e-14 * k * largest
        assert (vectors * values @ vectors.T - matrix).abs().max() <= 1e-14 * k * largest
        identity = torch.eye(k, dtype=torch.float64, device=device)
        torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-14 * k)


@pytest.mark.parametrize("name", ["AlignedMTL", "IMTLG"])
@pytest.mark.parametrize("k", [2, 5])
def test_weights_of_eigenvalues(name, k, generator, device, monkeypatch):
    rows = draw((k, 2 * k), torch.float64, generator)
    gramian, present = rows @ rows.T, torch.arange(k, device=device) > 0
    for mask in (present, torch.ones_like(present)):
        expected = PLAIN["gramian_weights"](gramian, mask, name, [])
        with monkeypatch.context() as patched:
            patched.setattr(_eigh, "_eigh", LAUNCHERS["eigh"])
            found = PLAIN["gramian_weights"](gramian, mask, name, [])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_nash_of_hard_gramians(generator, device):
    singular = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], device=device)
    everyone = torch.ones(3, dtype=torch.bool, device=device)
    found = LAUNCHERS["nash_weights"](singular, everyone)
    torch.testing.assert_close(found, PLAIN["nash_weights"](singular, everyone), rtol=1e-4, atol=0)
    assert found[2] == 0
    singular[0, 0] = float("inf")
    assert LAUNCHERS["nash_weights"](singular, everyone).isnan().all()
    assert (LAUNCHERS["nash_weights"](singular * 0, everyone * False) == 0).all()


def test_same_inputs_same_bits(generator):
    jacobian = draw((5, 10_000), torch.float32, generator)
    assert torch.equal(LAUNCHERS["gram"]([jacobian]), LAUNCHERS["gram"]([jacobian]))


def test_more_clusters_than_a_kernel_covers_are_logged_once(generator, caplog):
    jacobian = draw((65, 10), torch.float32, generator)
    _library._log_fallback.cache_clear()
    with caplog.at_level("INFO", "diffmtl_fast"):
        check("gram", ([jacobian],), 2e-6)
        check("gram", ([jacobian],), 2e-6)
    assert [r.message for r in caplog.records] == [
        "diffmtl::gram runs its plain definition: no kernel for K = 65"
    ]


def cluster_offsets(sizes, device):
    return torch.tensor([0, *sizes], device=device).cumsum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1,), (3, 0, 40), (16, 16), (0, 0), (33, 150, 1, 70)], ids=str)
@pytest.mark.parametrize("width", [(1, 1), (7, 40), (130, 16), (65, 129)], ids=str)
def test_weight_gradients(width, sizes, dtype, generator, device):
    grad_out, x = (draw((sum(sizes), w), dtype, generator) for w in width)
    offsets = cluster_offsets(sizes, device)
    check("cluster_wgrad", (grad_out, x, offsets), DTYPES[dtype])
    check("cluster_sum", (x, offsets), DTYPES[dtype])


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1200, 5, 0, 1100), (3, 70)], ids=str)  # in shares, and without
@pytest.mark.parametrize("accumulate", [False, True])
def test_sums_over_clusters_into_a_jacobian(sizes, dtype, out_dtype, accumulate, generator, device):
    if DEVICE == "cpu" and (dtype, out_dtype) == (torch.float64, torch.bfloat16):
        pytest.skip("Triton's interpreter has no conversion from float64 to bfloat16")
    grad_out, x = draw((sum(sizes), 6), dtype, generator), draw((sum(sizes), 20), dtype, generator)
    offsets = cluster_offsets(sizes, device)
    jacobian = draw((len(sizes), 150), out_dtype, generator)
    exact = jacobian.double()
    for rows, out in (
        ((grad_out, x), lambda j: j[:, 7:127].view(-1, 6, 20)),
        ((grad_out,), lambda j: j[:, 130:136]),
        ((x,), lambda j: j[:, ::7][:, :20]),
    ):
        name = f"cluster_{'wgrad' if len(rows) == 2 else 'sum'}_out"
        LAUNCHERS[name](*rows, offsets, out(jacobian), accumulate)
        PLAIN[name](*(r.double() for r in rows), offsets, out(exact), accumulate)
    error = (jacobian.double() - exact).norm() / exact.norm()
    assert error <= max(DTYPES[dtype], DTYPES[out_dtype])


def test_weight_gradients_of_strided_rows(generator, device):
    grad_out, x = draw((90, 30), torch.float32, generator), draw((40, 90), torch.float32, generator)
    offsets = cluster_offsets((20, 70), device)
    check("cluster_wgrad", (grad_out[:, 3:9], x.T, offsets), 2e-6)
    check("cluster_wgrad", (grad_out[:1].expand(90, 30), x[:, ::2].repeat(1, 2).T, offsets), 2e-6)
    check("cluster_sum", (x.T, offsets), 2e-6)
    out = torch.empty(2, 40, 6, device=device).transpose(1, 2)
    LAUNCHERS["cluster_wgrad_out"](grad_out[:, 3:9], x.T, offsets, out, False)
    expected = PLAIN["cluster_wgrad"](grad_out[:, 3:9].double(), x.T.double(), offsets)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


# Of one tile, and of several in both directions; divisible by nothing.
GROUPED = [((1, 1, 1), 1), ((3, 6), 2), ((2, 6, 5, 7), 3), ((2, 4, 8, 8), 2), ((1, 6, 1301), 2)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [*GROUPED, ((2, 2600, 1), 1), ((0, 4, 3), 2), ((2, 4, 0), 2)])
def test_group_norm_backward(shape, groups, dtype, weighted, generator, device):
    grad, x = draw(shape, dtype, generator), draw(shape, dtype, generator) + 3
    mean, rstd = torch.rand(2, shape[0], groups, generator=generator, device=device) + 1
    weight = draw(shape[1:2], torch.float32, generator).to(dtype) if weighted else None
    inputs = (grad, x, mean.to(dtype), rstd, weight)
    check("group_norm_backward", inputs, DTYPES[dtype])
    by_x, *affine = LAUNCHERS["group_norm_backward"](*inputs)
    assert by_x.dtype == dtype
    exact = PLAIN["group_norm_backward"](*(in_float64(t) for t in inputs))[1:]
    for found, reference in zip(affine, exact, strict=True):  # sums in float32, whatever was added up
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-4)


def test_group_norm_backward_of_mixed_dtypes(generator, device, monkeypatch):
    monkeypatch.setattr(layers, "run_plain", None)
    grad, x = draw((2, 2, 4, 3), torch.bfloat16, generator)
    mean, rstd = torch.rand(2, 2, 2, generator=generator, device=device)
    for dtype in DTYPES:
        weight = draw((4,), dtype, generator)
        check("group_norm_backward", (grad, x, mean.double(), rstd.to(dtype), weight), 1e-2)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_group_norm_backward_of_other_layouts(order, generator, device):
    grad, x = (draw((2, 4, 5, 6), torch.float32, generator).contiguous(memory_format=order) for _ in range(2))
    mean, rstd = torch.rand(2, 2, 2, generator=generator, device=device).transpose(1, 2)
    weight = draw((8,), torch.float32, generator)[::2]
    for view in (slice(None), slice(None, None, 2)):
        check("group_norm_backward", (grad[..., view], x[..., view], mean, rstd, weight), 2e-6)


def test_what_is_not_finite_stays_in_its_group(generator, device):
    grad, x = draw((2, 2, 4, 3), torch.float32, generator)
    x[1, 0, 2] = float("inf")
    mean, rstd = torch.ones(2, 2, 2, device=device)
    by_x, by_weight, by_bias = LAUNCHERS["group_norm_backward"](grad, x, mean, rstd, None)
    assert by_x.isfinite().all(2).tolist() == [[True] * 4, [False, False, True, True]]
    assert by_weight.isfinite().tolist() == [[True] * 4, [False, True, True, True]]
    assert by_bias.isfinite().all()


def test_group_norm_backward_in_float64_is_logged_once(generator, caplog):
    grad, x = draw((2, 2, 4, 3), torch.float64, generator)
    moments = torch.ones(2, 2, device=generator.device)
    _library._log_fallback.cache_clear()
    with caplog.at_level("INFO", "diffmtl_fast"):
        for _ in range(2):
            check("group_norm_backward", (grad, x, moments, moments, None), DTYPES[torch.float64])
    assert [r.message for r in caplog.records] == [
        "diffmtl::group_norm_backward runs its plain definition: no kernel for torch.float64"
    ]


# Of several shares, of one, without rows; of several tiles of rows, of more columns than the registers hold.
NORMALISED = [
    ((700, 40), (300, 0, 400)),
    ((9, 7), (1, 5, 3)),
    ((0, 4), (0, 0)),
    ((130, 1), (130,)),
    ((6, 9000), (2, 4)),
    ((7, 6, 5), (3, 0, 4)),
]


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "sizes"), NORMALISED, ids=str)
def test_cluster_norm_backward(shape, sizes, dtype, weighted, moved, generator, device):
    grad, x = draw(shape, dtype, generator), draw(shape, dtype, generator) + 1
    mean, rstd = torch.rand(2, shape[0], 1, generator=generator, device=device) + 0.5
    weight = draw((2 * shape[1],), torch.float32, generator)[::2] if weighted else None
    inputs = (grad, x, mean if moved else None, rstd, weight, cluster_offsets(sizes, device))
    start = draw((len(sizes), 3 * shape[1] + 1), torch.float32, generator)
    for wanted, accumulate in (((True, True), (False, True)), ((True, False), (True, False))):
        found, exact = start.clone(), start.double()
        found_outs, exact_outs = (
            [view if want else None for want, view in zip(wanted, views, strict=True)]
            for views in (
                (j[:, 1 : 1 + shape[1]], j[:, 1 + shape[1] :: 2][:, : shape[1]]) for j in (found, exact)
            )
        )
        by_x = LAUNCHERS["cluster_norm_backward"](*inputs, *found_outs, accumulate)
        expected = PLAIN["cluster_norm_backward"](*map(in_float64, inputs), *exact_outs, accumulate)
        assert by_x.dtype == dtype
        assert by_x.shape == x.shape
        error = (by_x.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error <= DTYPES[dtype]
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_offsets_of_the_host_are_uploaded_once_for_as_long_as_they_stay(generator, device):
    rows, offsets = draw((10, 3), torch.float32, generator), torch.tensor([0, 4, 10])
    uploads._offsets.cached.cache_clear()
    for _ in range(3):
        LAUNCHERS["cluster_sum"](rows, offsets)
        check("cluster_wgrad", (rows, rows, offsets.clone()), 2e-6)
    assert uploads._offsets.cached.cache_info()[:2] == (5, 1)
    offsets[1] = 7  # in place: the layout is another one
    check("cluster_sum", (rows, offsets), 2e-6)
    assert uploads._offsets.cached.cache_info()[:2] == (5, 2)


def test_what_a_graph_uploads_is_kept_for_its_replays(monkeypatch):
    class Gpu:  # a device by its type alone
        type = "cuda"

    made = uploads.Uploaded(lambda *key: np.array(key))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: (self, device, non_blocking))
    for _ in range(2):
        table, _, non_blocking = made(Gpu, 1, 2)
        assert non_blocking
        assert _host._READ_BY_GRAPHS.pop() is table  # ours is still there, whatever was uploaded before
    sizes = torch.tensor([1, 2])
    table, _, _ = _host.upload(sizes, Gpu)  # of a step in the graph
    assert _host._READ_BY_GRAPHS.pop() is table
    sizes[0] = 9
    assert table.tolist() == [1, 2]
    assert made.cached.cache_info().currsize == 0  # it belongs to the graph


def test_offsets_beyond_the_rows_touch_no_other_memory(device):
    rows = torch.ones(40, 3, device=device)[10:20]
    for bounds in ([0, 4, 99], [-7, 4, 10], [0, 2**40, -(2**40)]):
        offsets = torch.tensor(bounds, device=device)
        if (
            device.type == "cpu"
        ):  # on the host they are refused: what a kernel would do with them is seen below
            with pytest.raises(ValueError, match="nondecreasing"):
                LAUNCHERS["cluster_sum"](rows, offsets)
            out = torch.empty(2, 3)
            cluster_kernels._cluster_sum_kernel[1, 2, 1](
                rows, offsets, out, 10, 3, 3, 3, 0, ADD=False, ACCUMULATE=tl.float32, ROWS=4, BLOCK=4
            )
        else:
            out = LAUNCHERS["cluster_sum"](rows, offsets)
        low, middle, high = (min(max(b, 0), 10) for b in bounds)
        expected = [[max(b - a, 0)] * 3 for a, b in ((low, middle), (middle, high))]
        assert out.tolist() == expected


@pytest.mark.parametrize("accumulate", [False, True])
def test_clusters_of_one_size_as_a_batched_product(accumulate, generator, device):
    grad_out, x = draw((60, 8), torch.float32, generator), draw((60, 16), torch.float32, generator)
    jacobian = draw((3, 200), torch.float32, generator)
    expected, offsets = jacobian.clone(), torch.tensor([0, 20, 40, 60])
    layers._batched_wgrad(grad_out, x, jacobian[:, 9:137].view(3, 8, 16), accumulate)
    PLAIN["cluster_wgrad_out"](grad_out, x, offsets, expected[:, 9:137].view(3, 8, 16), accumulate)
    torch.testing.assert_close(jacobian, expected)
    assert layers._batched(x, offsets.tolist(), jacobian) == x.is_cuda
    assert not layers._batched(x, [0, 30, 60, 60], jacobian)
    assert not layers._batched(x, None, jacobian)


@pytest.mark.skipif(DEVICE == "cpu", reason="the BLAS library of the GPU writes float32 from shorter numbers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_batched_product_in_float32(dtype, generator):
    grad_out, x = draw((60, 8), dtype, generator), draw((60, 16), dtype, generator)
    out, offsets = draw((3, 8, 16), torch.float32, generator), torch.tensor([0, 20, 40, 60])
    expected = out.double()
    for accumulate in (True, False):
        LAUNCHERS["cluster_wgrad_out"](grad_out, x, offsets, out, accumulate)
        PLAIN["cluster_wgrad_out"](grad_out.double(), x.double(), offsets, expected, accumulate)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
