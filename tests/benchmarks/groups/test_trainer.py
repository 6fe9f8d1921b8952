"""The bundled trainer beside a loop by hand and beside its own steps alone."""

from __future__ import annotations

import pytest

from benchmarks.benchmark import Benchmark, Options
from benchmarks.groups import trainer
from benchmarks.harness import compare
from diffmtl_fast.train.history import History

*STEPS, DATA_AND_LOG = trainer.benchmarks(Options(scale="quick"))


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.case)
def test_both_learn(case: Benchmark) -> None:
    candidates = case.candidates()
    assert [each.name for each in candidates] == [trainer.LOOP, trainer.TRAINER]
    assert [each.error() for each in candidates if each.error] == [0.0, 0.0]
    found = compare(candidates, rounds=1, warmup=0)
    assert all(way.seconds[0] > 0 for way in found.ways)


def test_both_ways_train_and_one_of_them_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    lines = []
    flush = History.flush
    monkeypatch.setattr(History, "flush", lambda *given: lines.append(flush(*given)))
    found = compare(DATA_AND_LOG.candidates(), rounds=1, warmup=0)
    assert [way.name for way in found.ways] == [trainer.WITHOUT, trainer.WITH]
    assert [line["iteration"] for line in lines] == [10, 20]
    assert all(line["loss"] > 0 for line in lines)
