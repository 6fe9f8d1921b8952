"""Loops of Accelerate and Lightning on two processes are those of one process with all of their samples."""

from __future__ import annotations

import pytest
import torch
from framework_programs import accumulate_with_accelerate, train_with_lightning
from programs import LAYOUTS, assert_exact, expected


def test_accelerate(on_ranks):
    pytest.importorskip("accelerate")
    members = LAYOUTS["absent on ranks"][:2]
    for weighting in ("uw", "pcgrad"):
        found = on_ranks(2, accumulate_with_accelerate, members, weighting)
        wanted = expected(members, 2, weighting, torch.float64, backwards=2, accumulate=True)
        assert_exact([each for each, _ in found], wanted, 1e-9)
        for _, error in found:
            assert error.startswith(
                "expected ClusteredMTL around the bare model, found it within Distributed"
            )


def test_lightning(on_ranks):
    pytest.importorskip("lightning")
    (losses, mine, weights), (others, theirs, their_weights) = on_ranks(2, train_with_lightning, 40, 32)
    assert torch.equal(mine, theirs)
    assert torch.equal(weights, their_weights)
    assert losses != others  # each has samples of its own
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
