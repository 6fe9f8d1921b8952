"""The kernels of the methods that need the Gramian alone, beside their definitions in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm
from diffmtl_fast import ops
from diffmtl_fast.ops.gramian_weights import DEFINITIONS

from .conftest import KINDS

# How far the directions may differ, relative to Σ |w_k| |g_k|, where the weights themselves are not determined; of
# those that solve to a stated accuracy only, that.
LOOSE = {"CAGrad": 1e-5, "FairGrad": 1e-6}
# Of these kinds rounding decides which eigenvalues count.
UNDECIDED = {"AlignedMTL": ("lengths over six decades", "nearly parallel")}


def make(name):
    return getattr(dm, name)()


def plain(weighting, gramian, present=None):
    return ops.PLAIN["gramian_weights"](gramian, present, type(weighting).__name__, weighting.settings)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_kernels_find_the_directions_of_the_definitions(name, jacobians):
    generator = torch.Generator().manual_seed(1)
    weighting = make(name)
    kinds = tuple(kind for kind in KINDS if kind not in UNDECIDED.get(name, ()))
    for i, rows in enumerate(jacobians(kinds)):
        present = torch.rand(len(rows), generator=generator) < 0.8 if i % 3 == 0 else None
        gramian = rows @ rows.T
        found, expected = weighting(gramian, present), plain(weighting, gramian, present)
        lengths = rows.norm(dim=1)
        error = ((found - expected) @ rows).norm() / (found.abs() @ lengths).clamp(min=1e-300)
        assert error <= LOOSE.get(name, 1e-7), (i, rows)
        if present is not None:
            assert (found[~present] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_kernels_find_the_weights_of_the_definitions(name, dtype):
    """Gradients that determine the weights; odd K, up to 64, and any scale that the dtype can hold."""
    generator = torch.Generator().manual_seed(2)
    weighting = make(name)
    for k in (1, 2, 3, 5, 7, 17, 33, 64):
        rows = torch.randn(k, 4 * k, generator=generator, dtype=torch.float64) + 0.1
        rows *= 10 ** (torch.rand(k, 1, generator=generator, dtype=torch.float64) - 0.5)
        for unit in (1e-15, 1.0, 1e15):
            gramian = (rows @ rows.T * unit).to(dtype)
            found, expected = weighting(gramian), plain(weighting, gramian)
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.double(), expected.double(), rtol=1e-5 if dtype != torch.bfloat16 else 1e-2, atol=1e-6
            )


@pytest.mark.parametrize("name", DEFINITIONS)
def test_kernels_hold_what_their_inputs_may_be(name):
    weighting, nan = make(name), float("nan")
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    rows[4] = 0  # nothing to weigh
    gramian, present = rows @ rows.T, torch.tensor([True, False, True, True, True, True])
    gramian[1] = gramian[:, 1] = nan
    found = weighting(gramian, present)
    torch.testing.assert_close(found, plain(weighting, gramian, present))
    assert found[1] == found[4] == 0
    assert weighting(gramian).isnan().all()
    strided = torch.full((12, 12), nan)
    strided[::2, ::2] = gramian
    assert torch.equal(weighting(strided[::2, ::2], present.repeat_interleave(2)[::2]), found)
    assert (weighting(torch.zeros(3, 3)) == 0).all()
    assert (weighting(torch.eye(3), torch.zeros(3, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("k", [1, 2, 5, 9, 20])
def test_gradvacs_kernel_is_its_definition(k):
    generator = torch.Generator().manual_seed(k)
    targets = torch.zeros(k, k, dtype=torch.float64)
    for step in range(12):
        rows = torch.randn(k, 2 * k, generator=generator, dtype=torch.float64) + 0.3
        present = torch.rand(k, generator=generator) < 0.7 if step % 2 else None
        rows *= 10.0 ** (20 * step - 120)
        if step % 3 == 2:
            rows[0] = -rows[-1] if k > 1 else rows[0]
        given = (rows @ rows.T, dm.PCGrad(generator).draw_order(k), present, targets, 0.3)
        found, targets = torch.ops.diffmtl.gradvac_weights(*given)
        expected, moved = ops.PLAIN["gradvac_weights"](*given)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(targets, moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_settings_are_as_many_as_the_method_has(name):
    given = (*make(name).settings, 0.5)
    expected = rf"settings: expected {len(given) - 1} for {name}, found"
    for settings in (given, given[2:]) if len(given) > 1 else (given,):
        for compute in (ops.gramian_weights, lambda g, *rest: ops.PLAIN["gramian_weights"](g, None, *rest)):
            with pytest.raises(ValueError, match=expected):
                compute(torch.eye(2), name, settings)


def test_refuses():
    with pytest.raises(ValueError, match=r"method: expected one of .*MGDA.*, found 'NoSuch'"):
        ops.gramian_weights(torch.eye(2), "NoSuch")
    g, order, targets = torch.eye(2), torch.tensor([[1], [0]]), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"order: expected indices in 0..1, found 2"):
        ops.gradvac_weights(g, order + 1, targets, 0.5)
    with pytest.raises(TypeError, match="targets: expected float64 of shape"):
        ops.gradvac_weights(g, order, targets.float(), 0.5)
    with pytest.raises(ValueError, match=r"targets: expected float64 of shape \[2, 2\], found .* \[3, 2\]"):
        ops.gradvac_weights(g, order, targets.new_zeros(3, 2), 0.5)
