"""A step of the trainer beside one by hand: both learn, and are timed in the same rounds."""

from __future__ import annotations

import pytest

from benchmarks.benchmark import Options
from benchmarks.groups import trainer_step
from benchmarks.harness import compare


@pytest.mark.parametrize("case", trainer_step.benchmarks(Options(scale="quick")), ids=lambda case: case.case)
def test_both_learn(case):
    candidates = case.candidates()
    assert [each.name for each in candidates] == [trainer_step.LOOP, trainer_step.TRAINER]
    assert [each.error() for each in candidates] == [0.0, 0.0]
    found = compare(candidates, rounds=1, warmup=0)
    assert all(way.seconds[0] > 0 for way in found.ways)
