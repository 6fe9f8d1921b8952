"""The compiled CPU kernels, every instruction set of them, against definitions in float64."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from diffmtl_fast import ops
from diffmtl_fast._native import _C
from diffmtl_fast.ops import PLAIN, _library, cpu
from diffmtl_fast.ops.philox import philox

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@pytest.fixture(params=_C.cpu_kernels())
def instruction_set(request):
    """Each instruction set of this processor in turn."""
    _C.cpu_select_kernels(request.param)
    yield request.param
    cpu.select_instruction_set()


def norm_by_cluster(x, offsets):
    """Return all three gradients of a normalisation."""
    by_weight, by_bias = torch.empty(2, len(offsets) - 1, x.shape[1])
    moments = torch.ones(2, x.shape[0], 1)
    by_x = ops.cluster_norm_backward(x, x, *moments, None, offsets, by_weight=by_weight, by_bias=by_bias)
    return by_x, by_weight, by_bias


@pytest.fixture
def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def threads():
    """Set the number of threads; put it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(shape, dtype, generator, offset=0):
    """Draw a contiguous tensor that starts `offset` elements behind an aligned address."""
    numbers = torch.randn(offset + math.prod(shape), generator=generator, dtype=torch.float64).to(dtype)
    return numbers[offset:].view(shape)


def assert_gramian(found, jacobian):
    rows = jacobian.double()
    lengths = rows.norm(dim=1)
    unit = 1e-13 if jacobian.dtype == torch.float64 else 1e-6
    assert torch.equal(found, found.T)
    assert ((found.double() - rows @ rows.T).abs() <= unit * lengths.outer(lengths)).all()


def assert_combination(found, jacobian, weights):
    terms = weights.double().unsqueeze(1) * jacobian.double()
    rounding = 2e-15 if jacobian.dtype == torch.float64 else 1e-6
    bound = EPSILON[jacobian.dtype] * terms.sum(0).abs() + rounding * terms.abs().sum(0) + 1e-7
    assert ((found.double() - terms.sum(0)).abs() <= bound).all()


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


class TestGramAndCombine:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_number_of_rows(self, dtype, instruction_set, seeded):
        for k in range(1, 65):
            jacobian = draw((k, 1024 + 3 * k), dtype, seeded)
            weights = draw((k,), torch.float32, seeded)
            assert_gramian(ops.gram(jacobian), jacobian)
            assert_combination(ops.combine(jacobian, weights), jacobian, weights)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_more_rows_than_are_read_side_by_side(self, dtype, instruction_set, seeded, threads):
        # A panel has 6 to 48 rows, and 256 of its columns are multiplied at a time.
        shapes = (65, 1), (72, 15), (95, 256), (96, 257), (97, 1100), (145, 3000), (301, 700), (70, 0)
        for k, columns in shapes:
            jacobian = draw((k, columns), dtype, seeded, offset=1)
            threads(2)
            found = ops.gram(jacobian)
            assert_gramian(found, jacobian)
            threads(1)
            assert torch.equal(ops.gram(jacobian), found)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_parts_of_many_rows(self, dtype, instruction_set, seeded):
        whole = draw((100, 25_000), dtype, seeded)
        parts = [whole[:, :7], whole[:, 7:20_001], whole[:, 20_001:20_001], whole[:, 20_001:]]
        assert_gramian(ops.gram(parts), whole)
        strided = draw((200, 3000), dtype, seeded)[::2, 5:2000:3]
        assert_gramian(ops.gram(strided), strided)
        wide = draw((100, 600), torch.float64, seeded)
        mixed, expected = ops.gram([whole, wide]), whole.double() @ whole.double().T + wide @ wide.T
        assert mixed.dtype == torch.float64
        assert relative_error(mixed, expected) < (1e-13 if dtype == torch.float64 else 1e-6)

    def test_what_is_not_finite_stays_in_its_row_of_many(self, instruction_set, seeded):
        jacobian = draw((70, 600), torch.float32, seeded)
        jacobian[66, 550] = math.inf
        jacobian[3, 2] = math.nan
        wrong = ~ops.gram(jacobian).isfinite()
        assert wrong.sum() == 2 * 70 + 2 * 68
        assert wrong[3].all()
        assert wrong[66].all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("columns", [0, 1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 50_001])
    def test_every_end_of_a_row(self, columns, dtype, instruction_set, seeded):
        jacobian, weights = draw((5, columns), dtype, seeded, offset=1), draw((5,), dtype, seeded, offset=1)
        assert_gramian(ops.gram(jacobian), jacobian)
        assert_combination(ops.combine(jacobian, weights), jacobian, weights)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_parts_and_strides_of_a_larger_jacobian(self, dtype, instruction_set, seeded):
        whole, weights = draw((10, 3000), dtype, seeded), draw((5,), torch.float64, seeded)
        for part in (
            whole[::2, 7:2900],
            whole[:5, ::3],
            whole[:, :5].T[:, :7],
            whole[:1, :99].expand(5, 99),
        ):
            chosen = weights[: part.shape[0]]
            assert_gramian(ops.gram(part), part)
            assert_combination(ops.combine(part, chosen), part, chosen)

    def test_a_million_ones_are_counted(self, instruction_set):
        jacobian = torch.ones(2, 1_000_003, dtype=torch.float16)
        assert ops.gram(jacobian).tolist() == [[1_000_003] * 2] * 2

    def test_what_is_not_finite_stays_in_its_row(self, instruction_set, seeded):
        jacobian = draw((7, 100), torch.float32, seeded)
        jacobian[3, 50] = math.nan
        assert ops.gram(jacobian).isnan().sum() == 13
        assert ops.combine(jacobian, torch.ones(7)).isnan().nonzero().tolist() == [[50]]

    @pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_parts(self, dtype, out_dtype, instruction_set, seeded):
        for k in (1, 5, 8, 9, 17):
            sizes = (1, 15, 64, 1000, 0, 17_000, 3)
            parts = [draw((k, size), dtype, seeded, offset=1) for size in sizes]
            weights, whole = draw((k,), torch.float64, seeded), torch.cat(parts, dim=1)
            assert_gramian(ops.gram(parts), whole)
            terms = weights.unsqueeze(1) * whole.double()
            for accumulate in (False, True):
                out = [draw((size,), out_dtype, seeded, offset=3) for size in sizes]
                before = torch.cat(out).double() * accumulate
                square = ops.combine_(out, parts, weights, accumulate=accumulate)
                written, expected = torch.cat(out).double(), before + terms.sum(0)
                exact = torch.float64 in (dtype, out_dtype)
                rounding = (2e-15 if exact else 1e-6) * (before.abs() + terms.abs().sum(0))
                bound = EPSILON[out_dtype] * expected.abs() + rounding + 1e-7
                assert ((written - expected).abs() <= bound).all()
                assert relative_error(square, written.square().sum()) < (1e-14 if exact else 1e-6)

    @pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_output_past_the_caches(self, dtype, out_dtype, instruction_set, seeded):
        columns = 600_011
        row = draw((columns,), dtype, seeded)
        for k, offset in ((16, 0), (17, 1), (31, 31)):  # more than 32 MiB, as far as the kernel can see
            weights = torch.rand(k, generator=seeded, dtype=torch.float64)
            out = draw((columns,), out_dtype, seeded, offset)
            square = ops.combine_([out], [row.expand(k, columns)], weights)
            expected = weights.sum() * row.double()
            assert (
                (out.double() - expected).abs() <= (EPSILON[out_dtype] + 4e-6) * expected.abs() + 1e-7
            ).all()
            assert relative_error(square, out.double().square().sum()) < 1e-6

    def test_the_plain_definition_serves_more_rows_than_the_kernels(self, seeded, caplog):
        _library._log_fallback.cache_clear()
        jacobian, weights = draw((65, 33), torch.float32, seeded), draw((65,), torch.float32, seeded)
        with caplog.at_level(logging.INFO, logger="diffmtl_fast"):
            for _ in range(2):
                assert_combination(ops.combine(jacobian, weights), jacobian, weights)
        assert [record.message for record in caplog.records] == [
            "diffmtl::combine runs its plain definition: expected 1 to 64 rows, found 65"
        ]


class TestSquaredErrors:
    @pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(5, 1), (3, 17), (2, 4, 8, 8), (2, 4099), (1, 70_001)], ids=str)
    def test_every_pair_of_dtypes(self, shape, dtype, target_dtype, instruction_set, seeded):
        pred, target = draw(shape, dtype, seeded, offset=1), draw(shape, target_dtype, seeded, offset=3)
        weight = draw(shape[:1], torch.float32, seeded)
        expected = (pred.double() - target.double()).square().flatten(1).mean(1) * weight.double()
        found = ops.sample_mse(pred, target, weight)
        exact = torch.float64 in (dtype, target_dtype)
        assert found.dtype == (torch.float64 if exact else torch.float32)
        assert relative_error(found, expected) < (1e-14 if exact else 1e-6)

        scale = draw(shape[:1], torch.float32, seeded)
        grad = torch.ops.diffmtl.sample_mse_backward(scale, pred, target)
        plain = ops.PLAIN["sample_mse_backward"](scale, pred, target)
        assert grad.dtype == dtype
        assert torch.equal(grad, plain)

    @pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(5, 1), (3, 17), (2, 4, 8, 8)], ids=str)
    def test_both_gradients_from_one_pass(self, shape, dtype, target_dtype, instruction_set, seeded):
        pred = draw(shape, dtype, seeded, offset=1).requires_grad_()
        target = draw(shape, target_dtype, seeded, offset=3).requires_grad_()
        scale = draw(shape[:1], torch.float32, seeded)
        both = torch.ops.diffmtl.sample_mse_backward_both(scale, pred, target)
        plain = ops.PLAIN["sample_mse_backward_both"](scale, pred, target)
        assert [g.dtype for g in both] == [dtype, target_dtype]
        assert all(torch.equal(a, b) for a, b in zip(both, plain, strict=True))

        cluster = torch.arange(shape[0]) % 2
        (ops.cluster_mse(pred, target, cluster, 2) * torch.tensor([1.0, 3.0])).sum().backward()
        assert relative_error(pred.grad, -target.grad.double()) < EPSILON[dtype] + EPSILON[target_dtype]

    @pytest.mark.parametrize("layouts", ["channels_last", "mixed", "transposed"])
    def test_both_gradients_keep_their_strides(self, layouts, instruction_set, seeded):
        pred, target = draw((3, 5, 4, 7), torch.float32, seeded), draw((3, 5, 4, 7), torch.float64, seeded)
        pred = pred.transpose(0, 3) if layouts == "transposed" else pred
        target = target.transpose(0, 3).contiguous() if layouts == "transposed" else target
        pred = pred if layouts == "transposed" else pred.contiguous(memory_format=torch.channels_last)
        if layouts == "channels_last":
            target = target.contiguous(memory_format=torch.channels_last)
        scale = draw(pred.shape[:1], torch.float32, seeded)
        both = torch.ops.diffmtl.sample_mse_backward_both(scale, pred, target)
        plain = ops.PLAIN["sample_mse_backward_both"](scale, pred, target)
        for grad, expected, leaf in zip(both, plain, (pred, target), strict=True):
            assert grad.stride() == torch.empty_like(leaf).stride()
            assert torch.equal(grad, expected)

    @pytest.mark.parametrize(
        "layout", ["channels_last", "mixed", "half_channels", "transposed", "every_second"]
    )
    def test_layouts(self, layout, instruction_set, seeded):
        shape = (6, 4, 5, 8)
        pred, target = draw(shape, torch.float32, seeded), draw(shape, torch.float32, seeded)
        if layout in ("channels_last", "mixed"):
            pred = pred.contiguous(memory_format=torch.channels_last)
        if layout == "channels_last":
            target = target.contiguous(memory_format=torch.channels_last)
        if layout == "half_channels":  # a model that predicts a variance beside the noise
            pred, target = pred[:, :2], target[:, :2]
        if layout == "transposed":
            pred = pred.transpose(0, 3)
            target = target.transpose(0, 3).contiguous()
        if layout == "every_second":
            pred, target = pred[::2, :, :, ::2], target[::2, :, :, ::2]
        pred.requires_grad_()
        loss = ops.sample_mse(pred, target)
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        difference = (pred - target).detach().double()
        assert relative_error(loss.detach(), difference.square().flatten(1).mean(1)) < 1e-6
        assert grad.stride() == torch.empty_like(pred).stride()
        assert relative_error(grad, difference * 2 / pred[0].numel()) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_conversions_are_those_of_torch(self, dtype, instruction_set):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        half = torch.full((1,), every.numel() / 2, dtype=torch.float32)  # makes the factor 1
        finite = every[every.isfinite()]
        for shift in (0.0, 1e-8, 3e-6, 0.3, 1000.0, 65_000.0):
            shifts = torch.full((1, every.numel()), shift)
            found = torch.ops.diffmtl.sample_mse_backward(half, every[None], shifts)[0]
            expected = (every.float() - shift).to(dtype)
            assert torch.equal(found.isnan(), every.isnan())
            assert torch.equal(found[~every.isnan()], expected[~every.isnan()])
        assert torch.equal(ops.combine(finite[None], torch.ones(1)), finite)

    def test_cluster_mse_refuses_an_index_that_was_not_checked(self):
        pred = torch.zeros(3, 2)
        for bad in (-1, 2):
            with pytest.raises(ValueError, match=rf"indices in 0..1, found {bad}"):
                torch.ops.diffmtl.cluster_mse(pred, pred, torch.tensor([0, bad, 1]), 2)
            with pytest.raises(ValueError, match=rf"indices in 0..1, found {bad}"):
                torch.ops.diffmtl.cluster_mean_backward(torch.zeros(2), torch.tensor([0, bad, 1]))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_cluster_mean_of_strided_vectors(self, dtype, seeded):
        values = draw((20,), dtype, seeded)[::2].requires_grad_()
        cluster = torch.tensor([0, 3, 3, 1, 0, 0, 3, 3, 3, 1]).repeat_interleave(3)[::3]
        means = ops.cluster_mean(values, cluster, 5)
        expected = torch.stack(
            [values[cluster == k].double().sum() / max(1, (cluster == k).sum()) for k in range(5)]
        )
        assert relative_error(means, expected) < 1e-6
        (grad,) = torch.autograd.grad(means.sum(), values)  # the upstream gradient has stride 0
        sizes = torch.bincount(cluster, minlength=5)
        torch.testing.assert_close(
            grad, (1 / sizes[cluster].double()).to(dtype), rtol=2 * EPSILON[dtype], atol=0
        )


class TestMixedTargets:
    """sample_loss and its gradient where the target is given, generated, or formed from two."""

    @pytest.mark.parametrize("delta", [None, 0.7])
    @pytest.mark.parametrize("form", ["plain", "mixed", "seeded", "noise"])
    @pytest.mark.parametrize("other_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_form_and_dtype(self, dtype, other_dtype, form, delta, instruction_set, seeded):
        for shape in ((5, 1), (3, 17), (2, 4, 8, 8), (2, 2049)):
            pred, first = draw(shape, dtype, seeded, offset=1), draw(shape, other_dtype, seeded, offset=3)
            second, mix = draw(shape, other_dtype, seeded), draw((2, shape[0]), torch.float64, seeded)
            weight, scale = draw(shape[:1], torch.float32, seeded), draw(shape[:1], torch.float32, seeded)
            seed = torch.tensor(2**40 + 3)
            noise = ops.philox_normal(seed, pred)
            given, meant = {
                "plain": ((first, None, None), (first, None, None)),
                "mixed": ((first, second, mix), (first, second, mix)),
                "seeded": ((first, seed, mix), (first, noise, mix)),
                "noise": ((seed, None, None), (noise, None, None)),
            }[form]
            found = torch.ops.diffmtl.sample_loss(pred, *given, weight, delta)
            expected = ops.PLAIN["sample_loss"](pred, *meant, weight, delta)
            assert found.dtype == expected.dtype
            # Sums are formed in another order; what is summed has the same bits.
            exact = found.dtype == torch.float64
            assert relative_error(found, expected.double()) < (1e-14 if exact else 1e-6)
            grad = torch.ops.diffmtl.sample_loss_backward(scale, pred, *given, delta)
            assert torch.equal(grad, ops.PLAIN["sample_loss_backward"](scale, pred, *meant, delta))

    @pytest.mark.parametrize("form", ["mixed", "seeded"])
    @pytest.mark.parametrize(
        "layout", ["channels_last", "second_row_major", "parts", "expanded", "transposed"]
    )
    def test_layouts(self, layout, form, instruction_set, seeded):
        pred, first, second = (draw((6, 4, 5, 8), torch.float32, seeded) for _ in range(3))
        mix = draw((6, 2), torch.float32, seeded).T
        if layout in ("channels_last", "second_row_major"):
            pred, first = (t.contiguous(memory_format=torch.channels_last) for t in (pred, first))
        if layout == "channels_last":
            second = second.contiguous(memory_format=torch.channels_last)
        if layout == "parts":
            pred, first, second = pred[:, :2], first[:, 2:], second[:, 1:3]
        if layout == "expanded":
            first = first[:1].expand(6, 4, 5, 8)
        if layout == "transposed":
            pred, first, second = (t.transpose(1, 3) for t in (pred, first, second))
        seed = torch.tensor(5)
        given = second if form == "mixed" else seed
        meant = second if form == "mixed" else ops.philox_normal(seed, pred)
        scale = draw((12,), torch.float32, seeded)[::2]
        found = torch.ops.diffmtl.sample_loss(pred, first, given, mix, scale, None)
        expected = ops.PLAIN["sample_loss"](pred, first, meant, mix, scale, None)
        assert relative_error(found, expected.double()) < 1e-6
        grad = torch.ops.diffmtl.sample_loss_backward(scale, pred, first, given, mix, None)
        assert grad.stride() == torch.empty_like(pred).stride()
        assert torch.equal(grad, ops.PLAIN["sample_loss_backward"](scale, pred, first, meant, mix, None))

    def test_what_is_not_finite_stays_so(self, instruction_set):
        pred = torch.tensor([[math.nan, 2.0, -2.0, 0.25], [math.inf, 0.0, 0.0, -math.inf]])
        zeros, ones = torch.zeros(2, 4), torch.ones(2)
        for delta, slopes in ((None, [4.0, -4.0, 0.5]), (0.5, [0.5, -0.5, 0.25])):
            losses = torch.ops.diffmtl.sample_loss(pred, zeros, None, None, None, delta)
            assert losses[0].isnan()
            assert losses[1] == math.inf
            grad = torch.ops.diffmtl.sample_loss_backward(4 * ones, pred, zeros, None, None, delta)
            assert grad[0, 0].isnan()
            assert grad[0, 1:].tolist() == slopes
            assert grad[1, 0] == (math.inf if delta is None else 0.5)

    def test_the_image_is_not_read_where_the_noise_alone_is_the_target(self):
        seed, pred = torch.tensor(3), torch.zeros(2, 5)
        loss = ops.denoising_loss(pred, torch.full((2, 5), math.nan), seed, prediction="epsilon")
        torch.testing.assert_close(loss, ops.philox_normal(seed, pred).square().mean(1))


def exact_noise(seed, shape):
    """The noise by its definition, evaluated in float64, and the length of the pair that each value comes from."""
    batch, size = shape[0], math.prod(shape[1:])
    group = torch.arange(-(-size // 4)).expand(batch, -1)
    sample, zero = torch.arange(batch).unsqueeze(1).expand_as(group), torch.zeros_like(group)
    u = [((word >> 8) + 1).double() * 2.0**-24 for word in philox(seed, (group, zero, sample, zero))]
    lengths = [torch.sqrt(-2 * torch.log(u[0])), torch.sqrt(-2 * torch.log(u[2]))]
    turns = [2 * math.pi * u[1], 2 * math.pi * u[3]]
    normals = [
        length * f(turn) for length, turn in zip(lengths, turns, strict=True) for f in (torch.cos, torch.sin)
    ]
    both = torch.stack([torch.stack(normals, 2), torch.stack([lengths[i // 2] for i in range(4)], 2)])
    return both.flatten(2)[..., :size].reshape(2, *shape)


class TestNoise:
    @pytest.mark.parametrize("seed", [0, 7, 2**40 + 5, -3])
    def test_is_its_definition(self, seed, instruction_set):
        seed = torch.tensor(seed)
        for shape in ((1,), (7,), (3, 1), (2, 3), (5, 4), (3, 31), (2, 33), (2, 3, 5, 7), (2, 70_001)):
            found = ops.philox_normal(seed, torch.empty(shape))
            expected, length = exact_noise(seed, shape)
            assert found.dtype == torch.float32
            assert ((found - expected).abs() <= 2.0**-22 * length).all()

    def test_logarithm_sine_and_cosine_of_extreme_words(self, instruction_set, seeded):
        count = 2**16
        ends = torch.cat([torch.arange(1, count + 1), torch.arange(2**24 - count, 2**24) + 1])
        steps = torch.cat([ends, torch.randint(1, 2**24 + 1, (2 * count,), generator=seeded)])
        others = steps[torch.randperm(4 * count, generator=seeded)]
        last_byte = torch.randint(256, (4 * count,), generator=seeded)  # does not count
        radius, turn = (
            (((u - 1) << 8) + last_byte - 2**31).to(torch.int32) ^ -(2**31) for u in (steps, others)
        )
        cosine, sine = torch.empty(4 * count), torch.empty(4 * count)
        _C.cpu_box_muller(radius.data_ptr(), turn.data_ptr(), 4 * count, cosine.data_ptr(), sine.data_ptr())
        length, angle = (
            torch.sqrt(-2 * torch.log(steps.double() * 2.0**-24)),
            2 * math.pi * others.double() * 2.0**-24,
        )
        for found, unit in ((cosine, angle.cos()), (sine, angle.sin())):
            assert ((found - length * unit).abs() <= 2.0**-22 * length).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_add_noise_has_the_bits_of_its_definition(self, dtype, instruction_set, seeded):
        for shape, noise_dtype in itertools.product([(5, 1), (3, 17), (2, 4, 8, 8), (2, 2049)], DTYPES):
            x0, noise = draw(shape, dtype, seeded, offset=1), draw(shape, noise_dtype, seeded, offset=3)
            alpha, sigma = draw(shape[:1], torch.float64, seeded), draw(shape[:1], torch.float32, seeded)
            found = ops.add_noise(x0, noise, alpha, sigma)
            assert found.dtype == dtype
            assert torch.equal(found, ops.PLAIN["add_noise"](x0, noise, alpha, sigma))
            seed = torch.tensor(11)
            expected = ops.PLAIN["add_noise"](x0, ops.philox_normal(seed, x0), alpha, sigma)
            assert torch.equal(ops.add_noise(x0, seed, alpha, sigma), expected)

    @pytest.mark.parametrize(
        "layout", ["channels_last", "noise_row_major", "parts", "expanded", "transposed"]
    )
    def test_add_noise_of_layouts(self, layout, instruction_set, seeded):
        x0, noise = draw((6, 4, 5, 8), torch.float32, seeded), draw((6, 4, 5, 8), torch.float32, seeded)
        alpha, sigma = draw((12, 2), torch.float32, seeded)[::2].unbind(1)
        if layout in ("channels_last", "noise_row_major"):
            x0 = x0.contiguous(memory_format=torch.channels_last)
        if layout == "channels_last":
            noise = noise.contiguous(memory_format=torch.channels_last)
        if layout == "parts":
            x0, noise = x0[:, :2], noise[:, 1:3]
        if layout == "expanded":
            x0 = x0[:1].expand(6, 4, 5, 8)
        if layout == "transposed":
            x0, noise = x0.transpose(1, 3), noise.transpose(1, 3)
        seed = torch.tensor(4)
        for given, meant in ((noise, noise), (seed, ops.philox_normal(seed, x0))):
            found = ops.add_noise(x0, given, alpha, sigma)
            assert found.stride() == torch.empty_like(x0).stride()
            assert torch.equal(found, ops.PLAIN["add_noise"](x0, meant, alpha, sigma))

    def test_nothing_to_write(self):
        seed = torch.tensor(1)
        for shape in ((0,), (0, 3), (3, 0), (2, 0, 4)):
            empty, ones = torch.empty(shape), torch.ones(shape[0])
            assert ops.philox_normal(seed, empty).shape == shape
            assert ops.add_noise(empty, seed, ones, ones).shape == shape
            assert ops.add_noise(empty, empty, ones, ones).shape == shape


class TestInstructionSetsAgree:
    def test_on_every_bit_that_is_no_sum(self, seeded):
        seed, pred, x0 = (
            torch.tensor(9),
            draw((3, 5001), torch.float32, seeded),
            draw((3, 5001), torch.bfloat16, seeded),
        )
        mix, scale = draw((2, 3), torch.float32, seeded), draw((3,), torch.float32, seeded)
        results = []
        for name in _C.cpu_kernels():
            _C.cpu_select_kernels(name)
            results.append(
                [
                    ops.philox_normal(seed, x0),
                    ops.add_noise(x0, seed, *mix),
                    ops.add_noise(pred, x0, *mix),
                    torch.ops.diffmtl.sample_loss_backward(scale, pred, x0, seed, mix, 0.7),
                    *torch.ops.diffmtl.sample_mse_backward_both(scale, pred, x0),
                ]
            )
        cpu.select_instruction_set()
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def weight_gradients(grad_out, x, bounds):
    """The weight gradients in float64, and the sums of their terms' absolute values."""
    rows = [(grad_out[begin:end].double(), x[begin:end].double()) for begin, end in pairwise(bounds)]
    return torch.stack([g.T @ v for g, v in rows]), torch.stack([g.abs().T @ v.abs() for g, v in rows])


class TestSumsOverClusters:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_end_of_a_tile(self, dtype, instruction_set, seeded):
        bounds = [0, 5, 5, 8, 40]
        for outputs, inputs in itertools.product((1, 5, 6, 7, 13, 49), (1, 3, 15, 16, 31, 33, 64, 65, 130)):
            grad_out, x = (draw((40, w), dtype, seeded, offset=1) for w in (outputs, inputs))
            found = ops.cluster_wgrad(grad_out, x, torch.tensor(bounds))
            expected, absolute = weight_gradients(grad_out, x, bounds)
            unit = EPSILON[dtype] + (0 if dtype == torch.float64 else 1e-6)
            tiny = torch.finfo(dtype).smallest_normal
            assert ((found.double() - expected).abs() <= 4 * unit * absolute + tiny).all()

    @pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("longest", [0, 1 << 20], ids=["library", "own"])
    @pytest.mark.parametrize("accumulate", [False, True])
    def test_library_and_own_products(
        self, accumulate, longest, dtype, out_dtype, instruction_set, seeded, monkeypatch
    ):
        monkeypatch.setattr(cpu.layers, "_longest_own", lambda *_: longest)
        bounds = [0, 300, 600, 600, 607]
        grad_out, x = draw((607, 10), dtype, seeded), draw((607, 96), dtype, seeded)
        jacobian = draw((4, 1000), out_dtype, seeded, offset=1)
        out = jacobian[:, 2:962].view(4, 10, 96)
        before = out.double().clone()
        ops.cluster_wgrad(grad_out, x, torch.tensor(bounds), out=out, accumulate=accumulate)
        expected, absolute = weight_gradients(grad_out, x, bounds)
        unit = max(EPSILON[dtype], EPSILON[out_dtype]) + (0 if dtype == torch.float64 else 1e-6)
        bound = 4 * unit * (absolute + accumulate * before.abs()) + torch.finfo(out_dtype).smallest_normal
        assert ((out.double() - expected - accumulate * before).abs() <= bound).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("start", [0, 16, 1], ids=["aligned", "in a cache line", "misaligned"])
    def test_results_larger_than_the_caches(self, start, dtype, instruction_set, seeded):
        grad_out, x = draw((9, 300), dtype, seeded), draw((9, 1024), dtype, seeded)
        bounds = [0, 2, 9]
        memory = torch.full((2 * 300 * 1024 + 64,), math.nan, dtype=dtype)
        first = -memory.data_ptr() % 64 // memory.itemsize + start
        out = memory[first : first + 2 * 300 * 1024].view(2, 300, 1024)
        ops.cluster_wgrad(grad_out, x, torch.tensor(bounds), out=out)
        assert relative_error(out, weight_gradients(grad_out, x, bounds)[0]) < 4 * EPSILON[dtype]
        assert memory.isnan().sum() == 64

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("supported", [True, False])
    def test_numbers_that_the_library_may_not_multiply(self, supported, dtype, seeded, monkeypatch):
        monkeypatch.setattr(cpu.layers, "_library_multiplies", lambda _: supported)
        monkeypatch.setattr(cpu.layers, "_longest_own", lambda *_: 0)
        grad_out, x = draw((40, 5), dtype, seeded), draw((40, 6), dtype, seeded)
        out = torch.empty(1, 5, 6)
        ops.cluster_wgrad(grad_out, x, torch.tensor([0, 40]), out=out)
        error = relative_error(out, weight_gradients(grad_out, x, [0, 40])[0])
        assert error < (EPSILON[dtype] if supported else 1e-6)

    @pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sums_of_every_length(self, dtype, out_dtype, instruction_set, seeded):
        for rows in (0, 1, 7, 8, 9, 17, 1024, 1025, 2500):
            for columns in (1, 15, 16, 63, 65, 130) if rows < 1000 else (33,):
                values = draw((rows + 3, columns), dtype, seeded, offset=1)
                out = draw((2, columns), out_dtype, seeded)
                parts = [values[:3].double(), values[3:].double()]
                expected = out.double() + torch.stack([part.sum(0) for part in parts])
                terms = out.double().abs() + torch.stack([part.abs().sum(0) for part in parts])
                ops.cluster_sum(values, torch.tensor([0, 3, rows + 3]), out=out, accumulate=True)
                bound = EPSILON[out_dtype] * expected.abs() + 1e-6 * terms
                assert ((out.double() - expected).abs() <= bound).all()

    def test_long_sums_are_exact_where_float32_would_not_be(self, instruction_set):
        ones = torch.ones(2**24 + 2**12, 1)  # in float32, 2²⁴ + 1 = 2²⁴
        assert ops.cluster_sum(ones, torch.tensor([0, len(ones)])).item() == len(ones)


class TestWeights:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 17, 64])
    def test_agree_with_the_plain_definitions(self, k, dtype, seeded):
        order = torch.stack([torch.randperm(k - 1, generator=seeded) for _ in range(k)])
        order = order + (order >= torch.arange(k)[:, None])  # the other clusters, in random order
        for spread in (0, 3, 6):
            scale = 10 ** (spread * (torch.rand(k, 1, generator=seeded, dtype=torch.float64) - 0.5))
            jacobian = scale * draw((k, 4 * k), torch.float64, seeded)
            gramian = (jacobian @ jacobian.T).to(dtype)
            for present in (torch.ones(k, dtype=torch.bool), torch.rand(k, generator=seeded) < 0.7):
                tolerance = {"rtol": 1e-9 if dtype == torch.float64 else 1e-6, "atol": 0}
                found = ops.nash_weights(gramian, present)
                torch.testing.assert_close(found, ops.PLAIN["nash_weights"](gramian, present), **tolerance)
                found = ops.pcgrad_weights(gramian, order, present)
                expected = ops.PLAIN["pcgrad_weights"](gramian, order, present)
                torch.testing.assert_close(
                    found, expected, **(tolerance | {"atol": 1e-9 * expected.abs().max()})
                )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_strided_arguments(self, dtype, seeded):
        jacobian = draw((6, 20), torch.float64, seeded)
        gramian = (jacobian @ jacobian.T).to(dtype)[::2, ::2]
        order = torch.tensor([[1, 2], [2, 0], [0, 1]]).repeat(1, 2)[:, ::2]
        order[:] = torch.tensor([[1, 2], [2, 0], [0, 1]])
        present = torch.tensor([True, False, False, False, True, False])[::2]
        copies = (gramian.contiguous(), order.contiguous(), present.contiguous())
        assert torch.equal(ops.pcgrad_weights(gramian, order, present), ops.pcgrad_weights(*copies))
        assert torch.equal(ops.nash_weights(gramian, present), ops.nash_weights(copies[0], copies[2]))

    def test_a_row_that_is_not_finite_makes_nash_weights_nan(self):
        gramian = torch.eye(3)
        gramian[0, 1] = gramian[1, 0] = math.nan
        assert ops.nash_weights(gramian).isnan().all()

    def test_pcgrad_refuses_an_index_that_is_no_cluster(self):
        with pytest.raises(ValueError, match=r"order: expected indices in 0..1, found 2"):
            ops.pcgrad_weights(torch.eye(2), torch.tensor([[2], [0]]))


class TestThreads:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_their_number_changes_no_bit(self, dtype, threads, instruction_set, seeded):
        jacobian, weights = draw((5, 70_001), dtype, seeded), draw((5,), torch.float32, seeded)
        many, target = draw((300, 3001), dtype, seeded), draw((300, 3001), torch.float32, seeded)
        one, other = draw((1, 400_001), dtype, seeded), draw((1, 400_001), dtype, seeded)
        cluster, seed = torch.randint(4, (300,), generator=seeded), torch.tensor(3)
        parts = [draw((5, size), dtype, seeded) for size in (3, 20_000, 100, 70_001, 40)]
        out = [torch.ones(part.shape[1]) for part in parts]
        images = draw((300, 4, 8, 8), dtype, seeded)
        results = []
        for number in (1, 2, 3):
            threads(number)
            results.append(
                [
                    ops.gram(jacobian),
                    ops.combine(jacobian, weights),
                    ops.gram(parts),
                    ops.combine_(out, parts, weights),
                    ops.sample_mse(one, other),
                    ops.cluster_mse(many, target, cluster, 4),
                    ops.uncertainty_loss(many, target, cluster, weights[:4]),
                    torch.ops.diffmtl.sample_mse_backward(weights.repeat(60), many, target),
                    *torch.ops.diffmtl.sample_mse_backward_both(weights.repeat(60), many, target),
                    ops.denoising_loss(many, target, seed, prediction="velocity", huber_delta=0.5),
                    torch.ops.diffmtl.sample_loss_backward(weights.repeat(60), many, seed, None, None, None),
                    ops.add_noise(many, seed, weights.repeat(60), weights.repeat(60)),
                    ops.philox_normal(seed, one),
                    *torch.ops.diffmtl.uncertainty_loss(many, target, cluster, weights),
                    ops.cluster_wgrad(many[:, :50], many[:, 50:650], torch.arange(0, 301, 6)),
                    ops.cluster_sum(many, torch.tensor([0, 7, 300])),
                    *ops.group_norm_backward(many, many, *torch.ones(2, 300, 1)),
                    *norm_by_cluster(many, torch.tensor([0, 7, 300])),
                    *norm_by_cluster(images, torch.tensor([0, 7, 300])),
                    ops.cluster_conv_wgrad(images, images, torch.tensor([0, 7, 300]), 3, padding=1),
                ]
            )
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))

    def test_callers_at_the_same_time(self, threads, seeded):
        threads(2)
        jacobian = draw((5, 200_000), torch.float32, seeded)
        expected = ops.gram(jacobian)
        with ThreadPoolExecutor(4) as executor:
            for found in executor.map(lambda _: ops.gram(jacobian), range(40)):
                assert torch.equal(found, expected)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_process_has_threads_of_its_own(self, threads, seeded):
        threads(2)
        jacobian = draw((5, 200_000), torch.float32, seeded)
        expected = ops.gram(jacobian).tolist()
        child = os.fork()
        if child == 0:
            os._exit(0 if ops.gram(jacobian).tolist() == expected else 1)
        deadline = time.monotonic() + 60
        while not (status := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                pytest.fail("the forked process hangs")
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(status[1]) == 0


class TestDtypesThatNoPublicFunctionPasses:
    """The operators themselves can be called with anything: what no kernel reads is refused, not misread."""

    single, half = torch.ones(4, 2, 6, 6), torch.ones(4, 2, 6, 6, dtype=torch.float16)

    def test_mixed_targets(self, instruction_set):
        brain, mix = self.half.to(torch.bfloat16), torch.ones(2, 4)
        arguments = self.single, self.half, brain, mix
        for call in (
            lambda: torch.ops.diffmtl.sample_loss(*arguments, None, None),
            lambda: torch.ops.diffmtl.sample_loss_backward(mix[0], *arguments, None),
        ):
            with pytest.raises(ValueError, match=r"target: .* one dtype .*, found float16 and bfloat16"):
                call()

    def test_layers(self, instruction_set):
        rows, offsets = self.half.flatten(1), torch.tensor([0, 1, 4])
        mean = torch.ones(4, 1)
        for call in (
            lambda: torch.ops.diffmtl.cluster_wgrad(rows, rows.float(), offsets),
            lambda: torch.ops.diffmtl.group_norm_backward(self.half, self.single, mean, mean, None),
            lambda: torch.ops.diffmtl.cluster_norm_backward(
                self.half, self.single, mean, mean, None, offsets, None, None, [False, False]
            ),
        ):
            with pytest.raises(ValueError, match="expected one dtype, found float16 and float32"):
                call()
        out = torch.ones(2, 2, 2, 1, 1, dtype=torch.float64)
        whole = [1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]
        half, single = cpu.layers._images(self.half), cpu.layers._images(self.single)
        for images, found in (
            ((half, single), "float16 and float32"),
            ((single, single), "float32 and float64"),
        ):
            with pytest.raises(ValueError, match=f"cluster_conv_wgrad.*expected one dtype, found {found}"):
                _C.cpu_cluster_conv_wgrad(*images, [0, 1, 4], 1, whole, cpu.handles.handle(out), False, 1)


class TestInstructionSet:
    def test_environment_variable(self, monkeypatch):
        monkeypatch.setenv("DIFFMTL_CPU_KERNELS", "plain")
        assert cpu.select_instruction_set() == "plain"
        monkeypatch.setenv("DIFFMTL_CPU_KERNELS", "mmx")
        with pytest.raises(ValueError, match=r"DIFFMTL_CPU_KERNELS: expected one of plain.*, found mmx"):
            cpu.select_instruction_set()
        monkeypatch.delenv("DIFFMTL_CPU_KERNELS")
        assert cpu.select_instruction_set() == _C.cpu_kernels()[-1]

    def test_kernels_refuse_dtypes_that_they_do_not_have(self):
        weight = torch.tensor([2.0]).to(torch.float8_e4m3fn)
        with pytest.raises(TypeError, match=r"expected float32, .*, found torch\.float8_e4m3fn"):
            torch.ops.diffmtl.sample_mse(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), weight)


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 16, 37, 1030])
def test_normalisations_by_cluster(width, dtype, moved, instruction_set, seeded):
    """Registers that are full or not, several parts of a cluster, none of them at the beginning of one."""
    rows, offsets = 120, torch.tensor([0, 1, 1, 50, 120])
    grad, x = draw((rows, width), dtype, seeded), draw((rows, width), dtype, seeded) + 1
    mean, rstd = torch.rand(2, rows, 1, generator=seeded) + 0.5
    inputs = (grad, x, mean if moved else None, rstd, draw((width,), torch.float32, seeded), offsets)
    found, exact = torch.empty(2, 4, width), torch.empty(2, 4, width, dtype=torch.float64)
    by_x = torch.ops.diffmtl.cluster_norm_backward(*inputs, *found, [False, False])
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    expected = PLAIN["cluster_norm_backward"](*wide, *exact, (False, False))
    scale = expected.abs().max()
    assert (by_x.double() - expected).abs().max() <= (EPSILON[dtype] + 1e-6) * 4 * scale
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
