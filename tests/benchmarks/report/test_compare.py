"""Comparing made-up runs, whose noise, drift and slowdowns are known. No time is taken here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.report import Comparison, Results, Way, changes
from benchmarks.report.compare import MEMORY, MEMORY_BYTES, table

pytest.importorskip("scipy")

ENVIRONMENT = {
    "date": "2026-01-02T00:00:00+00:00",
    "cpu": "Some CPU",
    "threads": 2,
    "load": None,
    "gpu": None,
    "python": "3.12.1",
    "versions": {"torch": "2.13.0"},
}


def run(
    rng: np.random.Generator,
    cases: Sequence[tuple[int, float]],
    slower: Mapping[int, float] | None = None,
    drift: float = 0.02,
) -> Results:
    """Simulate a run: a case for every number of rounds and noise, a drift for every way, a load for every round.

    One round in fifty is disturbed, by up to a half. `slower` multiplies the first of our ways of a case.
    """

    def case(number: int, rounds: int, noise: float) -> Comparison:
        load = np.exp(rng.normal(0, 0.2, rounds))

        def times(factor: float, turns: int = rounds) -> tuple[float, ...]:
            disturbed = np.where(rng.random(rounds) < 0.02, rng.uniform(1.1, 1.5, rounds), 1.0)
            seconds = factor * load * disturbed * np.exp(rng.normal(0, noise, rounds))
            return tuple(seconds[:turns].tolist())

        def way(name: str, role: Any, factor: float, turns: int = rounds) -> Way:
            return Way(name, role, times(factor * np.exp(rng.normal(0, drift)), turns), tuple(range(turns)))

        ways = (
            Way("plain", "limit", times(1.0), tuple(range(rounds))),
            way("grouped", "ours", 1.1 * (slower or {}).get(number, 1.0)),
            way("sliced", "ours", 1.3),
            way("published", "reference", 4.0, max(1, rounds // 2)),
            way("by hand", "baseline", 1.4),
        )
        return Comparison("group", str(number), ways, times(1.0))

    found = tuple(case(number, *each) for number, each in enumerate(cases))
    return Results(ENVIRONMENT, None, {"device": "cpu", "scale": "default"}, found)


def mixed(rng: np.random.Generator, count: int) -> list[tuple[int, float]]:
    """Rounds from 2 to 15, noise from 1 to 10 %."""
    return [
        (int(rng.integers(2, 16)), float(np.exp(rng.uniform(*np.log((0.01, 0.1)))))) for _ in range(count)
    ]


def test_runs_of_the_same_code_are_seldom_told_apart() -> None:
    alarms, pairs = 0, 20
    for seed in range(pairs):
        rng = np.random.default_rng(seed)
        cases = mixed(rng, 30)
        found = changes(run(rng, cases), run(rng, cases))
        assert len(found.times) == 60
        alarms += found.regressed
    assert alarms <= 2  # at a level of 5 % for all 60 ratios together


def test_a_slowdown_of_30_percent_is_found_with_five_rounds() -> None:
    found = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cases = [(5, 0.02)] * 30
        times = changes(run(rng, cases), run(rng, cases, {3: 1.3})).times
        found += [c.case for c in times if c.regressed] == ["3"]
    assert found >= 8


def test_drift_between_runs_is_seen_in_the_ways_of_others() -> None:
    rng, cases = np.random.default_rng(0), [(7, 0.01)] * 30
    still = changes(run(rng, cases, drift=0.0), run(rng, cases, drift=0.0))
    adrift = changes(run(rng, cases, drift=0.1), run(rng, cases, drift=0.1))
    assert still.drift < 0.02
    assert 0.1 < adrift.drift < 0.2  # that of both runs together: 0.14
    assert max(c.threshold for c in still.times) < min(c.threshold for c in adrift.times)
    assert not adrift.regressed
    assert f"drifted by {adrift.drift:.1%} between the runs" in table(adrift)


def test_more_ratios_need_more_of_a_difference() -> None:
    rng = np.random.default_rng(0)
    before, after = (run(rng, [(5, 0.03)] * 20) for _ in range(2))
    few = changes(replace(before, comparisons=before.comparisons[:1]), after).times[0]
    many = changes(before, after).times[0]
    assert (few.case, few.way) == (many.case, many.way)
    assert few.threshold < many.threshold


def quiet(memory: int | None = None, **changed: Any) -> Results:
    found = run(np.random.default_rng(0), [(5, 0.01)])
    (case,) = found.comparisons
    ways = tuple(replace(way, memory=memory) if way.role == "ours" else way for way in case.ways)
    return replace(found, **{"comparisons": (replace(case, ways=ways),)} | changed)


def test_memory_beyond_the_tolerance_is_a_regression() -> None:
    size = 2**30
    more = int((1 + MEMORY) * size) + 2
    assert changes(quiet(size), quiet(10 * size)).regressed
    assert changes(quiet(size), quiet(more)).regressed
    assert not changes(quiet(size), quiet(int((1 + MEMORY) * size) - 2)).regressed
    assert not changes(quiet(1), quiet(MEMORY_BYTES)).regressed
    assert not changes(quiet(more), quiet(size)).regressed
    text = table(changes(quiet(size), quiet(10 * size)))
    assert "| group: 0 | grouped | 1,024.0 MiB | 10,240.0 MiB | 10.000 (more memory) | 10% |" in text
    assert "0 of 2 peaks of memory are within 10%" in text
    assert "(less memory)" in table(changes(quiet(10 * size), quiet(size)))
    assert changes(quiet(size), quiet(None)).memory == ()


def test_settings_and_versions_that_differ_are_said() -> None:
    later = quiet(
        environment=ENVIRONMENT | {"versions": {"torch": "2.14.0"}},
        settings={"device": "cpu", "scale": "full"},
    )
    found = changes(quiet(), later)
    assert found.differing == ("scale default, then full", "torch 2.13.0, then 2.14.0")
    assert len(found.times) == 2
    assert "The runs differ in: scale default, then full; torch 2.13.0, then 2.14.0." in table(found)


def test_another_number_of_threads_is_not_compared() -> None:
    found = changes(quiet(), quiet(environment=ENVIRONMENT | {"threads": 1}))
    assert (found.times, found.missing, found.regressed) == ((), (), False)
    assert found.apart == {"threads 2, then 1": ("group: 0",)}
    assert "Not compared, threads 2, then 1: group: 0" in table(found)


def test_a_case_with_other_parameters_is_not_compared() -> None:
    (case,) = quiet().comparisons
    runs = [quiet(), quiet()]
    for i, batch in enumerate((40, 20)):
        runs[i] = replace(runs[i], comparisons=(replace(case, parameters={"k": 5, "batch": batch}),))
    found = changes(*runs)
    assert (found.times, found.regressed) == ((), False)
    assert found.apart == {"batch 40, then 20": ("group: 0",)}


def test_what_another_scale_leaves_out_is_no_regression() -> None:
    empty = quiet(comparisons=(), settings={"device": "cpu", "scale": "quick"})
    found = changes(quiet(), empty)
    assert not found.regressed
    assert found.apart == {"not in the later run (scale default, then quick)": ("group: 0",)}
    assert changes(quiet(), quiet(comparisons=())).regressed
    part = quiet(comparisons=(), settings={"device": "cpu", "scale": "default", "groups": ["step"]})
    assert not changes(quiet(), part).regressed
