from __future__ import annotations

import pytest

from benchmarks.benchmark import Options
from benchmarks.groups.trainer_loop import WITH, WITHOUT, loop_benchmark
from benchmarks.harness import compare
from diffmtl_fast.train.history import History


def test_both_ways_train_and_one_of_them_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    lines = []
    flush = History.flush
    monkeypatch.setattr(History, "flush", lambda *given: lines.append(flush(*given)))
    candidates = loop_benchmark(Options(scale="quick")).candidates()
    found = compare(candidates, rounds=1, warmup=0)
    assert [way.name for way in found.ways] == [WITHOUT, WITH]
    assert [line["iteration"] for line in lines] == [10, 20]
    assert all(line["loss"] > 0 for line in lines)
