from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.groups import end_to_end
from benchmarks.groups.end_to_end import Problem, Scale, Training
from benchmarks.harness import GateError, compare


@pytest.fixture
def problem(device: torch.device) -> Problem:
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    return Problem(Scale((8, 8), 20, 0.9, 4, 40), device)


def descending(model: nn.Module) -> Any:
    return end_to_end._plain(model)


def ascending(model: nn.Module) -> Any:
    """Train uphill."""
    step, extra = descending(model)

    def update(model: nn.Module, batch: Any) -> None:
        step(model, batch)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()

    return update, extra


def test_a_training_says_its_steps_and_not_the_gates(problem: Problem) -> None:
    training = Training(problem, descending)
    found = compare([training.candidate("plain")], rounds=2, warmup=0, clock=end_to_end.own_clock)
    (way,) = found.ways
    assert way.error == 0.0
    assert len(way.notes["steps"]) == len(way.seconds) + len(found.again)
    assert all(step % 4 == 0 and 0 < step <= 40 for step in way.notes["steps"])
    # The same batches in the same round, for whoever has the turn.
    assert way.notes["steps"][::2] == way.notes["steps"][1::2]


def test_a_training_that_goes_uphill_is_not_timed(problem: Problem) -> None:
    with pytest.raises(GateError, match=r"expected a held-out loss <= .* within 4 steps"):
        compare([Training(problem, ascending).candidate("uphill")], rounds=1)


def test_a_peer_that_does_not_arrive_is_left_out(problem: Problem) -> None:
    unreachable = Training(Problem(Scale((8, 8), 20, 0.1, 4, 8), problem.device), descending)
    found = compare(
        [Training(problem, descending).candidate("plain"), unreachable.candidate("peer", peer=True)],
        rounds=2,
        warmup=0,
        clock=end_to_end.own_clock,
    )
    assert [way.name for way in found.ways] == ["plain"]
    assert "expected a held-out loss <= 0.1 within 8 steps" in found.left_out["peer"]
