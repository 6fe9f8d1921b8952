"""Steps of several processes with a fully sharded model are the step of one process with all of their samples."""

from __future__ import annotations

import pytest
import torch
from fully_sharded_programs import train
from programs import LAYOUTS, assert_exact, expected

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
UNEQUAL = "unequal and unsorted"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", ["equal", "uw", "pcgrad", "nash"])
def test_two_ranks(on_ranks, weighting, layout):
    for dtype, tolerance in TOLERANCE.items():
        found = on_ranks(2, train, layout, weighting, dtype)
        assert_exact(found, expected(layout, 2, weighting, dtype), tolerance)
