"""Lines of the log: means, gaps, cutting back."""

from __future__ import annotations

import json
import math

import pytest
import torch

from diffmtl_fast._errors import TrainingDiverged, UserError
from diffmtl_fast.train.history import History, describe, read
from diffmtl_fast.train.sinks import TensorBoard


def _add(history, losses, present=(True, True)):
    history.add(torch.tensor(losses), torch.tensor(present), torch.tensor([1.0, 3.0]))


def test_a_line_holds_the_means_over_the_batches_that_had_the_cluster(tmp_path):
    history = History(tmp_path / "log.jsonl")
    _add(history, [1.0, 4.0])
    _add(history, [3.0, 0.0], present=(True, False))
    history.add_gradient_norm(torch.tensor(2.0))
    line = history.flush(10, seconds=1.5)
    history.close()
    assert line == {
        "iteration": 10, "loss": 3.0, "losses": [2.0, 4.0], "weights": [1.0, 3.0], "gradient_norm": 2.0,
        "seconds": 1.5,
    }  # fmt: skip
    assert read(tmp_path / "log.jsonl") == [line]


def test_a_cluster_never_seen_is_null(tmp_path):
    history = History(tmp_path / "log.jsonl")
    _add(history, [1.0, 0.0], present=(True, False))
    assert history.flush(1)["losses"] == [1.0, None]
    history.close()
    assert json.loads((tmp_path / "log.jsonl").read_text())["losses"] == [1.0, None]


def test_conflicts_are_the_mean_share_of_the_measured_steps(tmp_path):
    history = History(tmp_path / "log.jsonl")
    for inner in (-0.5, 0.25, None, -1.0):
        gramian = None if inner is None else torch.tensor([[1.0, inner], [inner, 4.0]])
        history.add(torch.ones(2), torch.ones(2, dtype=torch.bool), gramian=gramian)
    line = history.flush(4)
    history.close()
    assert line["conflicts"] == pytest.approx(2 / 3)
    assert line["cosines"][0][1] == pytest.approx((-0.25 + 0.125 - 0.5) / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(tmp_path, value):
    history = History(tmp_path / "log.jsonl")
    _add(history, [1.0, value], present=(True, False))
    history.check(1)
    _add(history, [1.0, value])
    with pytest.raises(TrainingDiverged, match="cluster 1"):
        history.flush(2)
    history.close()
    assert read(tmp_path / "log.jsonl") == []


def test_a_resumed_log_continues_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "log.jsonl"
    history = History(path)
    for iteration in (1, 2, 3):
        _add(history, [float(iteration), 1.0])
        history.flush(iteration)
        if iteration == 2:
            _add(history, [10.0, 1.0])  # collected, not yet written
            state = {
                key: list(value) if isinstance(value, list) else value
                for key, value in history.state_dict().items()
            }
    history.close()
    history = History(path)
    history.load_state_dict(state, torch.device("cpu"))
    _add(history, [20.0, 1.0])
    history.flush(4)
    history.close()
    assert [(line["iteration"], line["losses"][0]) for line in read(path)] == [(1, 1.0), (2, 2.0), (4, 15.0)]


def test_the_phase_of_a_curriculum_is_in_the_line_and_on_the_terminal(tmp_path):
    history = History(tmp_path / "log.jsonl")
    _add(history, [1.0, 4.0])
    line = history.flush(1, phase=3)
    history.close()
    assert read(tmp_path / "log.jsonl")[0]["phase"] == 3
    assert describe(line) == "loss 2.5000  clusters 1.000 4.000  phase 3"


def test_a_shortened_log_is_refused(tmp_path):
    history = History(tmp_path / "log.jsonl")
    _add(history, [1.0, 1.0])
    history.flush(1)
    state = history.state_dict()
    history.close()
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(UserError, match=r"log\.jsonl: expected the"):
        History(tmp_path / "log.jsonl").load_state_dict(state, torch.device("cpu"))


def test_tensorboard_has_a_curve_per_cluster(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = History(tmp_path / "log.jsonl", [TensorBoard(tmp_path / "board")])
    history.add(torch.ones(2), torch.tensor([True, True]), torch.ones(2), torch.eye(2))
    history.flush(5)
    history.close()
    board = events.EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"loss", "losses/cluster_0", "weights/cluster_1", "cosines/0_1", "conflicts"} <= set(
        board.Tags()["scalars"]
    )
    assert board.Scalars("losses/cluster_1")[0].step == 5
