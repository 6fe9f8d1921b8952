"""All solvers against each other, at sizes enumeration cannot reach."""

import itertools
import math
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast.clustering import (
    AbsoluteDeviation,
    Affinity,
    SquaredDeviation,
    cluster_affinity,
    cluster_intervals,
    cluster_path,
)

COSTS = [AbsoluteDeviation, SquaredDeviation]


def sequences(generator, n, kind):
    if kind == "normal":
        x = np.sort(generator.normal(size=n))
    elif kind == "duplicates":
        x = np.sort(generator.integers(-3, 4, n)).astype(float)
    elif kind == "line":
        x = np.arange(n) * 0.1
    elif kind == "constant":
        x = np.full(n, 0.3)
    elif kind == "heavy tails":
        x = np.sort(generator.normal(size=n) ** 9)
    elif kind == "pairs":
        x = np.repeat(np.arange((n + 1) // 2) * 10.0, 2)[:n] + np.arange(n) % 2
    else:
        x = np.sort(np.round(generator.normal(size=n), 1) + generator.integers(0, 3, n) * 100)
    return x[::-1].copy() if generator.random() < 0.5 else x


KINDS = ["normal", "duplicates", "line", "constant", "heavy tails", "pairs", "groups"]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_solvers_agree(cost, kind):
    generator = np.random.default_rng(KINDS.index(kind))
    for _ in range(250):
        n = int(generator.integers(1, 60))
        k = int(generator.integers(1, n + 1))
        limits = {}
        if generator.random() < 0.6:
            limits["min_size"] = int(generator.integers(1, n // k + 1))
        if generator.random() < 0.6:
            limits["max_size"] = int(generator.integers(-(-n // k), n + 1))
        problem = cost(sequences(generator, n, kind))
        dense, divide, penalised = (
            cluster_intervals(problem, n, k, solver=solver, **limits)
            for solver in ("dense", "divide", "penalised")
        )
        assert divide == dense, (n, k, limits)
        assert penalised == dense, (n, k, limits)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 7, 40])
def test_solvers_agree_on_long_sequences(cost, kind, k):
    # Long enough for the filter on doubles, the threads and the coarse guess to matter.
    n = 20_011
    problem = cost(sequences(np.random.default_rng(k), n, kind))
    divide = cluster_intervals(problem, n, k, solver="divide", threads=3)
    assert cluster_intervals(problem, n, k, solver="divide", threads=1) == divide
    penalised = cluster_intervals(problem, n, k, solver="penalised")
    assert penalised.cost == pytest.approx(divide.cost, rel=1e-15, abs=0)
    assert (penalised.sizes**2).sum() == (divide.sizes**2).sum()


@pytest.mark.parametrize("cost", COSTS)
def test_penalised_splices_where_every_k_is_on_one_line(cost):
    # Far pairs of near values: from 2000 to 4000 intervals each one more saves the same.
    n = 4000
    problem = cost(sequences(np.random.default_rng(0), n, "pairs"))
    for k in (2500, 3000, 3999):
        found = cluster_intervals(problem, n, k, solver="penalised")
        exact = {AbsoluteDeviation: 1.0, SquaredDeviation: 0.5}[cost]
        assert found.cost == (n - k) * exact
        assert set(found.sizes) == {1, 2}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("n", [999, 100_003])
def test_cost_is_accurate(cost, n):
    x = np.sort(np.random.default_rng(n).normal(size=n)) + 1e4
    found = cluster_intervals(cost(x), n, 6)
    terms = []
    for l, e in zip(found.boundaries[:-1], found.boundaries[1:], strict=True):
        part = x[l:e].astype(np.longdouble)
        if cost is AbsoluteDeviation:
            terms.append(math.fsum(np.abs(part - part[len(part) // 2])))
        else:
            mean = math.fsum(part - part[0]) / np.longdouble(len(part)) + part[0]
            terms.append(math.fsum((part - mean) ** 2))
    assert found.cost == pytest.approx(math.fsum(terms), rel=1e-13)


def split_costs(cost, x):
    """The cost of two intervals for each split 1 … n - 1 in Python's integers, times n 2^20, then floored."""
    n, units = len(x), 2**20
    x = x if x[0] <= x[-1] else -x
    prefix = np.concatenate([[0], np.add.accumulate(x.astype(object))])
    split = np.arange(1, n)
    if cost is AbsoluteDeviation:
        total = prefix[split] - prefix[split // 2] - prefix[(split + 1) // 2]
        ends = split + n
        return n * units * (total + prefix[split] + prefix[n] - prefix[ends // 2] - prefix[(ends + 1) // 2])
    squares = n * units * sum(int(v) ** 2 for v in x)
    left, size = prefix[split], split.astype(object)
    return squares - n * units * left**2 // size - n * units * (prefix[n] - left) ** 2 // (n - size)


@pytest.mark.parametrize("solver", ["divide", "penalised"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("m", [9, 701, 100_001])
@pytest.mark.parametrize("left", [True, False])
def test_the_cost_that_chooses_boundaries_is_exact(cost, solver, m, left):
    # Zero between two groups, symmetric but for one element near their medians: which group zero joins hangs on
    # 2^-44 of the range in one term.
    outer = np.sort(np.random.default_rng(m).integers(0, 2**40, m))
    x = np.concatenate([-outer[::-1] - 2**43, [0], outer + 2**43])
    x[m // 2 if left else -1 - m // 2] += -1 if left else 1
    costs = split_costs(cost, x)
    nearest = np.argpartition(costs.astype(float), 8)[:8]
    best, second = sorted(nearest, key=lambda i: costs[i])[:2]
    assert 0 < costs[second] - costs[best] < 2**-38 * costs[best]
    assert best + 1 == (m if left else m + 1)
    found = cluster_intervals(cost(x * 2.0**-40), k=2, solver=solver)
    assert found.boundaries.tolist() == [0, best + 1, len(x)]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 2**50])
def test_the_best_of_two_in_rational_arithmetic(cost, kind, shift):
    # Integers, so that only the cost's own rounding is left: 73 bits of the largest cost there can be.
    n = 3001
    x = sequences(np.random.default_rng(1), n, kind)
    x = np.round(x / max(abs(x).max(), 1e-9) * 2**48).astype(np.int64) + shift
    costs = split_costs(cost, x - shift)
    found = cluster_intervals(cost(x.astype(float)), k=2)
    spread = int(x.max() - x.min())
    allowed = 0 if cost is AbsoluteDeviation else n * 2**20 * (n * spread**2 >> 73)
    assert costs[found.boundaries[1] - 1] - costs.min() <= allowed + 2


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_path_is_the_optimum_of_every_k(seed):
    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 40))
    min_size, max_size = int(generator.integers(1, 4)), int(generator.integers(4, 41))
    if n < min_size or not any(j * min_size <= n <= j * max_size for j in range(1, n + 1)):
        return
    x = sequences(generator, n, KINDS[seed % len(KINDS)])
    matrix = generator.integers(-2, 3, (n, n)).astype(float)
    for cost in (AbsoluteDeviation(x), SquaredDeviation(x), Affinity(matrix)):
        path = cluster_path(cost, n, min_size=min_size, max_size=max_size)
        assert path.ks.tolist() == [j for j in range(1, n + 1) if j * min_size <= n <= j * max_size]
        for k in path.ks:
            assert path[k] == cluster_intervals(cost, n, int(k), min_size=min_size, max_size=max_size)


@pytest.mark.parametrize("threads", [1, 4])
def test_affinity_does_not_depend_on_threads_or_precision_of_the_input(threads):
    matrix = np.random.default_rng(0).normal(size=(301, 301)).astype(np.float32)
    expected = cluster_affinity(matrix.astype(np.float64), 7, threads=1)
    assert cluster_affinity(matrix, 7, threads=threads) == expected
    assert cluster_affinity(np.asfortranarray(matrix), 7, threads=threads) == expected


@pytest.mark.parametrize("n", [31, 32, 33, 64, 97])
def test_affinity_across_tiles(n):
    # The plain programme, at sizes around the tile of rows.
    matrix = np.random.default_rng(n).integers(-5, 6, (n, n)).astype(float)
    prefix = np.concatenate([np.zeros((n, 1)), matrix.cumsum(axis=1)], axis=1)
    for k in (1, 2, 5):
        best = [{0: (0.0, 0, [0])}]
        for _ in range(k):
            layer = {}
            for e in range(1, n + 1):
                options = [
                    (
                        cost - (prefix[(l + e) // 2, e] - prefix[(l + e) // 2, l]),
                        squares + (e - l) ** 2,
                        l,
                        boundaries,
                    )
                    for l, (cost, squares, boundaries) in best[-1].items()
                    if l < e
                ]
                if options:
                    cost, squares, _, boundaries = min(options, key=lambda option: option[:3])
                    layer[e] = (cost, squares, [*boundaries, e])
            best.append(layer)
        cost, _, boundaries = best[-1][n]
        found = cluster_affinity(matrix, k)
        assert (found.cost, found.boundaries.tolist()) == (cost, boundaries)


@pytest.mark.parametrize(
    ("solver", "n", "k"), [("dense", 200_000, 5), ("divide", 300_000, 1000), ("penalised", 3_000_000, 1000)]
)
def test_interrupt_stops_a_long_solve(solver, n, k):
    x = np.sort(np.random.default_rng(0).normal(size=n))

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    previous = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGUSR1])
    timer.start()
    try:
        with pytest.raises(Stopped):
            cluster_intervals(AbsoluteDeviation(x), k=k, solver=solver, threads=2)
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, previous)


def test_other_threads_run_during_a_solve():
    x = np.sort(np.random.default_rng(0).normal(size=300_000))
    done = threading.Event()
    counts = []

    def count():
        ticks = 0
        while not done.is_set():
            ticks += 1
            time.sleep(0)
        counts.append(ticks)

    worker = threading.Thread(target=count)
    worker.start()
    while not worker.is_alive():
        pass
    cluster_intervals(AbsoluteDeviation(x), k=12, solver="divide", threads=1)
    done.set()
    worker.join()
    assert counts[0] > 10  # a solve that held the GIL would leave one or two


def test_bad_solver_and_threads():
    with pytest.raises(ValueError, match="solver: expected auto, divide, penalised or dense, found fast"):
        cluster_intervals(AbsoluteDeviation([1, 2]), k=1, solver="fast")
    with pytest.raises(ValueError, match="threads: expected 1 to 1024, found 0"):
        cluster_intervals(AbsoluteDeviation([1, 2]), k=1, threads=0)
    with pytest.raises(ValueError, match="expected auto or dense for a cost without"):
        cluster_intervals(Affinity([[1.0]]), k=1, solver="divide")


@pytest.mark.parametrize("cost", COSTS)
def test_costs_at_ten_million_values(cost):
    values = np.sort(np.random.default_rng(0).standard_normal(10**7)) * 20 + 3
    found = cluster_intervals(cost(values), k=8)
    exact = np.longdouble(0)
    for l, e in itertools.pairwise(found.boundaries.tolist()):
        part = values[l:e].astype(np.longdouble)
        if cost is AbsoluteDeviation:
            exact += np.abs(part - part[(e - l) // 2]).sum()
        else:
            exact += np.square(part - part.mean()).sum()
    assert abs(found.cost - exact) <= 1e-12 * exact
