"""The gates of the steps of two processes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from benchmarks.benchmark import Options
from benchmarks.groups.distributed import ALL_REDUCED, PLAIN, TOLERANCE, WHOLE, Processes, benchmarks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def test_all_but_the_reference_of_the_others_have_a_gate() -> None:
    for case in benchmarks(Options(scale="quick")):
        assert [each.name for each in case.candidates() if each.error is None] == [ALL_REDUCED]


def test_the_step_of_ddp_has_the_gradient_of_the_whole_batch() -> None:
    processes = Processes("tiny", 20, 5)
    found, whole, balanced = (processes.sketch(way) for way in (PLAIN, WHOLE, ALL_REDUCED))
    assert (found - whole).norm() < TOLERANCE * whole.norm()
    assert (balanced - whole).norm() > 0.01 * whole.norm()  # the gate tells other gradients apart
