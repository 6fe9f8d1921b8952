from __future__ import annotations

import numpy as np
import pytest

from benchmarks.benchmark import Options
from benchmarks.groups import clustering
from benchmarks.groups.clustering import EXACT, Work
from benchmarks.harness import GateError, compare
from benchmarks.measure import measure


@pytest.mark.parametrize(("n", "k"), [(30, 3), (60, 5), (12, 5), (9, 1)])
def test_every_way_finds_the_least_cost(n: int, k: int) -> None:
    work = Work(clustering.normal(n), k)
    x = work.x
    ways = [work.ours("ours", "absolute"), work.ours("ours, squared", "squared")]
    ways.append(work.candidate("by hand", "absolute", lambda: clustering.by_hand(x, k)))
    for name, kind, solve in (
        ("kmeans1d", "squared", lambda x, k: clustering.cuts(clustering.by_kmeans1d(x, k))),
        ("ruptures", "absolute", clustering.by_ruptures),
    ):
        if n >= 30:  # ruptures makes no cluster of a single element, which small optima have
            pytest.importorskip(name)
            ways.append(work.candidate(name, kind, lambda solve=solve: solve(x, k)))
    for way in ways:
        assert way.error is not None
        assert way.error() <= EXACT, way.name


def test_by_hand_on_a_falling_curve() -> None:
    x = -clustering.linear_log_snr(50)
    assert Work(x, 4).candidate("by hand", "absolute", lambda: clustering.by_hand(x, 4)).error() < EXACT  # type: ignore[misc]


def test_total_is_the_definition() -> None:
    x = np.array([0.0, 1.0, 3.0, 10.0, 12.0])
    assert clustering.total("absolute", x, np.array([0, 3, 5])) == 5.0
    assert clustering.total("squared", x, np.array([0, 3, 5])) == pytest.approx(14 / 3 + 2)


def test_a_dearer_partition_is_refused() -> None:
    work = Work(clustering.normal(20), 2)
    options = Options("cpu", "quick", memory=False)
    title = "normal draws, T = 400, k = 2"
    found = next(b for b in clustering.benchmarks(options) if b.case == title)
    wrong = work.candidate(clustering.OURS, "absolute", lambda: [0, 1, 20])
    assert wrong.error is not None
    assert wrong.error() > 0.01
    with pytest.raises(GateError, match="diffmtl_fast: expected a relative error <= 1e-09"):
        compare([work.limit(), wrong], 1)
    assert measure(found, options).left_out == dict.fromkeys(("published", "ruptures"), clustering.TOO_SLOW)


@pytest.mark.parametrize("kind", clustering.KINDS)
def test_an_optimum_is_settled_and_a_moved_boundary_is_not(kind: str) -> None:
    x = clustering.normal(2000)
    found = clustering.cluster_intervals(clustering.KINDS[kind](x), 2000, 20).boundaries
    assert clustering.settled(kind, x, found)
    for shift in (-20, 20):
        moved = found.copy()
        moved[10] += shift
        assert not clustering.settled(kind, x, moved)


def test_one_thread_stands_beside_kmeans1d() -> None:
    work = next(b for b in clustering.benchmarks(Options("cpu")) if b.parameters.get("T") == 1_000_000)
    assert {clustering.ONE_THREAD, "kmeans1d"} < work.ways.keys()
