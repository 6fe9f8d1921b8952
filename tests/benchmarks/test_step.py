from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import diffmtl_fast as dm
from benchmarks import models, step
from benchmarks.harness import GateError
from benchmarks.models import Case


@pytest.fixture
def small() -> Case:
    torch.manual_seed(0)
    model = models.DiT(width=24, depth=1)
    return Case("small", model, models.dit(10, step.NUM_CLUSTERS).batch, {})


@pytest.mark.parametrize("make", step.CASES)
def test_every_way_passes_its_gate(make: Callable[[int, int], Case]) -> None:
    pytest.importorskip("cvxpy")
    pytest.importorskip("ecos")
    torch.manual_seed(step.SEED)
    for candidate in step.candidates(make(10, step.NUM_CLUSTERS)):
        if candidate.error is not None:
            assert candidate.error() <= candidate.tolerance, candidate.name


def test_a_step_that_skips_its_gradients_is_not_timed(small: Case) -> None:
    run = step.ours(small, dm.NashMTL(update_every=2))
    run()
    with pytest.raises(GateError, match="expected a Gramian in every step"):
        run()


def test_slices_by_hand_give_every_cluster_gradient(small: Case) -> None:
    found = torch.stack([torch.cat([g.flatten() for g in row]) for row in step.by_hand(small)])
    torch.testing.assert_close(found, step.k_backwards(small).jacobian, rtol=1e-4, atol=1e-6)
