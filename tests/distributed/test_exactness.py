"""Steps of several processes are the step of one process with all of their samples."""

from __future__ import annotations

import pytest
import torch
from programs import LAYOUTS, K, assert_exact, expected, train

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
GROUPED, SLICED = {"engine": "grouped"}, {"engine": "sliced"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", ["equal", "uw"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_weightings_of_losses(on_ranks, ranks, weighting, layout):
    for dtype, tolerance in TOLERANCE.items():
        found = on_ranks(ranks, train, layout, weighting, dtype)
        assert_exact(found, expected(layout, ranks, weighting, dtype), tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", ["pcgrad", "nash"])
@pytest.mark.parametrize(
    "options", [[GROUPED], [SLICED], [GROUPED, SLICED]], ids=["grouped", "sliced", "one of each"]
)
def test_weightings_of_gradients(on_ranks, options, weighting, layout):
    for dtype, tolerance in TOLERANCE.items():
        found = on_ranks(2, train, layout, weighting, dtype, options)
        assert_exact(found, expected(layout, 2, weighting, dtype), tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_and_many_buckets(on_ranks, layout):
    found = on_ranks(4, train, layout, "pcgrad", torch.float64, [GROUPED, SLICED], bucket=5000)
    assert_exact(found, expected(layout, 4, "pcgrad", torch.float64), 1e-9)
