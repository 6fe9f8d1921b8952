from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Candidate, GateError, Spread, compare, relative_error


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def test_rounds_run_every_candidate_and_the_baseline_twice() -> None:
    baseline, other = Counter(), Counter()
    result = compare("case", Candidate("base", baseline), [Candidate("other", other)], rounds=5, warmup=1)
    assert (baseline.calls, other.calls) == (1 + 2 * 5, 1 + 5)
    assert [row.name for row in result.rows] == ["base", "other"]
    assert result.rows[0].ratio == Spread(1.0, 1.0, 1.0)


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_nothing_is_timed_behind_a_red_gate(error: float) -> None:
    baseline, other = Counter(), Counter()
    wrong = Candidate("wrong", other, lambda: error, tolerance=0.1)
    with pytest.raises(GateError, match=r"wrong: expected a relative error <= 0.1, found"):
        compare("case", Candidate("base", baseline), [wrong], rounds=3)
    assert baseline.calls == other.calls == 0


def test_ratios_are_those_within_a_round() -> None:
    # The machine slows down tenfold half-way; the other always takes twice the baseline's time.
    base, other = Counter(), Counter()

    def slow_clock(run: object, repeats: int) -> float:
        assert isinstance(run, Counter)
        run()
        load = 1.0 if other.calls + base.calls <= 15 else 10.0
        return load * (2.0 if run is other else 1.0)

    others = [Candidate("other", other)]
    result = compare("case", Candidate("base", base), others, rounds=10, warmup=0, clock=slow_clock)
    assert result.rows[1].ratio == Spread(2.0, 2.0, 2.0)
    assert result.noise == Spread(1.0, 1.0, 1.0)
    assert result.rows[1].seconds.high == 20.0


def test_short_work_is_repeated() -> None:
    turns: list[tuple[str, int]] = []

    def clock(run: Callable[[], object], repeats: int) -> float:
        turns.append((str(run()), repeats))
        return 0.4 if run() == "slow" else 0.03

    slow, fast = Candidate("slow", lambda: "slow"), Candidate("fast", lambda: "fast")
    compare("case", slow, [fast], rounds=1, clock=clock, least=0.1)
    assert turns[:2] == [("slow", 1), ("fast", 1)]
    assert sorted(turns[2:]) == [("fast", 4), ("slow", 1), ("slow", 1)]


def test_slow_ways_sit_rounds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, slower, base = Counter(), Counter(), Counter()
    price = {base: 1.0, slow: 4.0, slower: 24.0}

    def clock(run: object, repeats: int) -> float:
        assert isinstance(run, Counter)
        run()
        return price[run]

    others = [Candidate("slow", slow), Candidate("slower", slower)]
    result = compare("case", Candidate("base", base), others, 6, warmup=0, clock=clock, allowance=2.0)
    # Taken part in: 0 (4 > 2), 2 (8 > 6), 4; and 0 alone.
    assert [row.runs for row in result.rows] == [6, 3, 1]
    assert [row.ratio.median for row in result.rows] == [1.0, 4.0, 24.0]
    assert result.noise == Spread(1.0, 1.0, 1.0)


def test_peers_that_fail_are_left_out_with_the_reason() -> None:
    def broken() -> float:
        raise RuntimeError("no a|b\nmore")

    peers = [
        Candidate("wrong", Counter(), lambda: 1.0, tolerance=0.5, peer=True),
        Candidate("broken", Counter(), broken, peer=True),
        Candidate("right", Counter(), lambda: 0.25, tolerance=0.5, peer=True),
    ]
    result = compare("case", Candidate("base", Counter()), peers, rounds=1, k=5)
    assert [(row.name, row.error) for row in result.rows] == [("base", None), ("right", 0.25)]
    assert result.left_out == {
        "wrong": "wrong: expected a relative error <= 0.5, found 1",
        "broken": r"RuntimeError: no a\|b",
    }
    assert result.parameters == {"k": 5}
    assert r"| broken | RuntimeError: no a\|b |" in result.table()
    with pytest.raises(RuntimeError, match="no a"):
        compare("case", Candidate("base", Counter()), [Candidate("ours", Counter(), broken)], rounds=1)


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_results_are_stored_with_what_they_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    result = compare("case", Candidate("base", Counter()), [], rounds=2)
    before = harness.environment() | {"commit": "as it was before the run"}
    record = json.loads(harness.write("name", [result], before, batch=40).read_text())
    assert record["environment"]["commit"] == "as it was before the run"
    assert record["settings"] == {"batch": 40}
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["comparisons"][0]["rows"][0]["name"] == "base"
    assert result.table().count("| base |") == 1
