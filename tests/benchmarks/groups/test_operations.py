"""The host's work for an operation: both chains have the same gradients; a turn is what the runs say it took."""

from __future__ import annotations

import pytest
import torch

from benchmarks.benchmark import Options
from benchmarks.groups import operations
from benchmarks.names import OURS


def test_a_turn_is_the_mean_of_what_the_runs_say():
    said = iter([1.0, 3.0])
    assert operations.own_clock(lambda: next(said), 2) == 2.0


@pytest.mark.parametrize("operation", operations.CASES)
def test_gradients_agree_and_a_longer_chain_takes_longer(operation, monkeypatch):
    monkeypatch.setattr(operations, "SHORT", 1)
    cases = [b for b in operations.benchmarks(Options(scale="quick")) if b.parameters["op"] == operation]
    assert [case.parameters["direction"] for case in cases] == ["forward", "backward"]
    for case in cases:
        plain, ours = case.candidates()
        assert [plain.name, ours.name] == [operations.PLAIN, OURS]
        assert ours.error() <= ours.tolerance
        assert min(max(each.run() for _ in range(3)) for each in (plain, ours)) > 0


def test_gradients_that_differ_are_told():
    chains = [operations.Chain("matmul", 2, torch.device("cpu"), by_cluster) for by_cluster in (False, True)]
    with torch.no_grad():
        chains[0].model[0].weight.mul_(2)
    assert operations.relative_error(chains[1].gradient(), chains[0].gradient()) > 0.1
