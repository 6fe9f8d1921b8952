"""Interval clustering beside the published procedure, a vectorised one, kmeans1d, ruptures; growth with T and k.

Every result is held to the least cost, on which the library's two solvers and the peers have to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Candidate
from benchmarks.names import KMEANS1D, OURS, PUBLISHED, SQUARED, Group
from benchmarks.reference.clustering import affinity_cost, optimal_intervals, snr_cost
from benchmarks.report.results import Role
from diffmtl_fast._extras import require
from diffmtl_fast.clustering import (
    AbsoluteDeviation,
    SquaredDeviation,
    cluster_affinity,
    cluster_intervals,
    cluster_snr,
)

Array = NDArray[np.float64]
Boundaries = NDArray[np.int64]
KINDS: dict[str, type[AbsoluteDeviation] | type[SquaredDeviation]] = {
    "absolute": AbsoluteDeviation,
    "squared": SquaredDeviation,
}
LIMIT, NUMPY, RUPTURES = "one pass over the data", "NumPy, by hand", "ruptures"
ONE_THREAD = f"{SQUARED}, one thread"  # as kmeans1d has
NO_ROOM = "needs a matrix of T² costs; see the smaller sizes"
TOO_SLOW = "too slow at this size; see the smaller sizes"
ABSENT = {PUBLISHED: TOO_SLOW, RUPTURES: TOO_SLOW}
EXACT = 1e-9  # relative difference of costs that are added up in another order


def normal(n: int) -> Array:
    """Sorted draws of a normal distribution."""
    return np.sort(np.random.default_rng(0).normal(size=n))


def linear_log_snr(n: int) -> Array:
    """log-SNR of the linear schedule."""
    log_signal = np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, n)))
    return log_signal - np.log(-np.expm1(log_signal))


def total(kind: str, x: Array, boundaries: Sequence[int] | Boundaries) -> float:
    """The cost by its definition."""
    cost = 0.0
    for l, e in pairwise(boundaries):
        part = x[l:e]
        centre = part[len(part) // 2] if kind == "absolute" else part.mean()
        cost += float((np.abs(part - centre) if kind == "absolute" else (part - centre) ** 2).sum())
    return cost


def by_hand(x: Array, k: int) -> Boundaries:
    """The dynamic programme over a matrix of all T² costs (absolute deviation), a minimum of a row at a time.

    Args:
        x: [T], monotone, so that sums on either side of the centre do without absolute values.
        k: K.
    """
    n = len(x)
    sums = np.concatenate([[0.0], np.cumsum(x)])
    left, end = np.ogrid[: n + 1, : n + 1]
    middle = np.clip((left + end) // 2, 0, n - 1)
    below = x[middle] * (middle - left) - (sums[middle] - sums[left])
    above = (sums[end] - sums[middle]) - x[middle] * (end - middle)
    cost = np.where(left < end, np.abs(below + above), np.inf)
    best, splits = cost[0], []
    for _ in range(k - 1):
        totals = best[:, None] + cost
        splits.append(totals.argmin(0))
        best = totals[splits[-1], np.arange(n + 1)]
    boundaries = [n]
    for split in reversed(splits):
        boundaries.append(int(split[boundaries[-1]]))
    return np.array([0, *boundaries[::-1]])


def by_kmeans1d(x: Array, k: int) -> list[int]:
    """Optimal squared deviation, on one thread; the label of every element, as kmeans1d returns them."""
    labels: list[int] = require("kmeans1d", "bench").cluster(x, k).clusters
    return labels


def cuts(labels: Sequence[int]) -> Boundaries:
    """Return the boundaries of sorted labels."""
    return np.array([0, *(np.flatnonzero(np.diff(labels)) + 1), len(labels)])


def by_ruptures(x: Array, k: int) -> Boundaries:
    """Optimal absolute deviation from the median."""
    ruptures = require("ruptures", "bench")
    return np.array([0, *ruptures.Dynp(model="l1", min_size=1, jump=1).fit(x[:, None]).predict(k - 1)])


class Work:
    """One sequence to cut into k intervals, and the least cost of each kind."""

    def __init__(self, x: Array, k: int) -> None:
        self.x, self.k = x, k
        self._least = cache(self._find_least)

    def _find_least(self, kind: str) -> float:
        found = cluster_intervals(KINDS[kind](self.x), len(self.x), self.k, solver="divide")
        return total(kind, self.x, found.boundaries)

    def candidate(
        self,
        name: str,
        kind: str,
        solve: Callable[[], Sequence[int] | Boundaries],
        tolerance: float = EXACT,
        peer: bool = False,
        read: Callable[[Any], Sequence[int] | Boundaries] = lambda found: found,
    ) -> Candidate:
        """Return a way whose error is how much dearer its partition is than the best; reading it is not timed."""

        def error() -> float:
            least = self._least(kind)
            return abs(total(kind, self.x, read(solve())) - least) / (least or 1.0)

        return Candidate(name, solve, error, tolerance, peer)

    def ours(self, name: str, kind: str, threads: int | None = None) -> Candidate:
        """Return our solver, by default on all threads."""

        def solve() -> Boundaries:
            return cluster_intervals(KINDS[kind](self.x), len(self.x), self.k, threads=threads).boundaries

        return self.candidate(name, kind, solve)

    def limit(self) -> Candidate:
        """Return what any solver has to do: read the data once."""
        return Candidate(LIMIT, lambda: np.cumsum(self.x))


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    yield _snr(options, options.pick(60, 1000), with_ruptures=False)
    yield _snr(options, options.pick(40, 200), with_ruptures=True)
    yield _deviation(options.pick(500, 1_000_000), 8, options.pick(2, 5), with_one_thread=True)
    yield _affinity(options.pick(40, 200, 1000), options)
    yield _large(options)
    yield from _growth(options)


def _snr(options: Options, n: int, *, with_ruptures: bool) -> Benchmark:
    """What a user does first: the whole call, log-SNR of a schedule in, five clusters out."""
    published = options.published()
    name = PUBLISHED if published is None else published.label
    ways: dict[str, Role] = {LIMIT: "limit", OURS: "ours", name: "reference", NUMPY: "baseline"}
    if with_ruptures:
        ways[RUPTURES] = "peer"

    def build() -> list[Candidate]:
        x, k = linear_log_snr(n), 5
        work = Work(x, k)
        found = [
            work.limit(),
            work.candidate(OURS, "absolute", lambda: cluster_snr(x, k).boundaries),
            work.candidate(NUMPY, "absolute", lambda: by_hand(x, k)),
        ]
        if published is None:
            found.append(
                work.candidate(name, "absolute", lambda: optimal_intervals(snr_cost(x), n, k)[0].tolist())
            )
        else:
            found.append(published.clustering(name, work))
        if with_ruptures:
            found.append(work.candidate(RUPTURES, "absolute", lambda: by_ruptures(x, k), peer=True))
        return found

    absent = {KMEANS1D: "minimises squared deviation only; see the cases with that cost"}
    if not with_ruptures:
        absent[RUPTURES] = TOO_SLOW
    rounds = options.pick(2, 7)
    return Benchmark(
        Group.CLUSTERING,
        f"log-SNR, T = {n}, k = 5",
        ways,
        build,
        rounds,
        {"cost": "log-SNR", "T": n, "k": 5},
        absent=absent,
        least=2e-3,
        grace=3.0,
        warmup=0,
    )


def _deviation(n: int, k: int, rounds: int, *, with_one_thread: bool = False) -> Benchmark:
    """Squared deviation, which kmeans1d minimises too, and the absolute one at the same size."""
    ways: dict[str, Role] = {LIMIT: "limit", OURS: "ours", SQUARED: "ours"}
    absent = {}
    if n <= 1000:
        ways[NUMPY] = "baseline"
    else:
        absent[NUMPY] = NO_ROOM
    if n <= 1_000_000:
        ways[KMEANS1D] = "peer"
        if with_one_thread:
            ways[ONE_THREAD] = "ours"
    else:
        absent[KMEANS1D] = TOO_SLOW
    if n <= 316:
        ways |= {PUBLISHED: "reference", RUPTURES: "peer"}
    else:
        absent |= ABSENT

    def build() -> list[Candidate]:
        work = Work(normal(n), k)
        x = work.x
        found = [
            work.limit(),
            work.ours(OURS, "absolute"),
            work.ours(SQUARED, "squared"),
            work.ours(ONE_THREAD, "squared", threads=1),
            work.candidate(KMEANS1D, "squared", lambda: by_kmeans1d(x, k), peer=True, read=cuts),
            work.candidate(NUMPY, "absolute", lambda: by_hand(x, k)),
            work.candidate(PUBLISHED, "absolute", lambda: optimal_intervals(snr_cost(x), n, k)[0].tolist()),
            work.candidate(RUPTURES, "absolute", lambda: by_ruptures(x, k), peer=True),
        ]
        return [candidate for candidate in found if candidate.name in ways]

    # The limit takes next to no time, so that no multiple of it would let kmeans1d run twice: `grace` does.
    return Benchmark(
        Group.CLUSTERING,
        f"normal draws, T = {n:,}, k = {k:,}",
        ways,
        build,
        rounds,
        {"cost": "deviation", "T": n, "k": k},
        absent,
        least=2e-3,
        grace=15.0,
        warmup=0,
    )


def _affinity(n: int, options: Options) -> Benchmark:
    """The cost that needs a matrix."""
    published = options.published()
    name = PUBLISHED if published is None else published.label

    def build() -> list[Candidate]:
        tas = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
        tas = (tas + tas.T) * np.float32(0.5)
        exact: Array = tas.astype(np.float64)
        least = cache(lambda: optimal_intervals(affinity_cost(exact), n, 5)[1])

        def candidate(way: str, solve: Callable[[], Sequence[int] | Boundaries]) -> Candidate:
            def error() -> float:
                found = sum(affinity_cost(exact)(l, e) for l, e in pairwise(solve()))
                return abs(found / least() - 1.0)

            return Candidate(way, solve, error, 1e-6)

        reference = (
            candidate(name, lambda: optimal_intervals(affinity_cost(exact), n, 5)[0].tolist())
            if published is None
            else published.affinity_clustering(name, exact, least)
        )
        return [
            Candidate(LIMIT, tas.sum),
            candidate(OURS, lambda: cluster_affinity(tas, 5).boundaries),
            reference,
        ]

    ways: dict[str, Role] = {LIMIT: "limit", OURS: "ours", name: "reference"}
    absent = {
        KMEANS1D: "has no such cost",
        RUPTURES: "has no such cost",
        NUMPY: "see the log-SNR cost: the same programme over another matrix",
    }
    return Benchmark(
        Group.CLUSTERING,
        f"task affinity, T = {n}, k = 5",
        ways,
        build,
        3,
        {"cost": "affinity", "T": n, "k": 5},
        absent,
        least=2e-3,
        grace=3.0,
        warmup=0,
    )


def _large(options: Options) -> Benchmark:
    """The largest size, with peak memory."""
    n, k = options.pick((2000, 20), (10_000_000, 1000))

    ways: dict[str, Role] = {LIMIT: "limit", OURS: "ours", SQUARED: "ours"}
    absent = {**ABSENT, NUMPY: NO_ROOM, KMEANS1D: TOO_SLOW}
    return Benchmark(
        Group.CLUSTERING,
        f"normal draws, T = {n:,}, k = {k:,}",
        ways,
        partial(_large_candidates, n, k),
        2,
        {"cost": "deviation", "T": n, "k": k},
        absent,
        memory=True,
        allowance=float("inf"),
        warmup=0,
    )


def _large_candidates(n: int, k: int) -> list[Candidate]:
    # The other solver would take hours: see `_solved` for what is checked.
    x = normal(n)
    ours = [_solved(OURS, "absolute", x, k), _solved(SQUARED, "squared", x, k)]
    return [Candidate(LIMIT, lambda: np.cumsum(x)), *ours]


def _solved(name: str, kind: str, x: Array, k: int) -> Candidate:
    """Return our solver, held to what an optimum must satisfy.

    The cost that it states is that of its partition, and no element at a boundary is closer to the centre of the
    next interval than to that of its own. Both are necessary; that the cost is the least is shown at smaller
    sizes, against another solver.
    """

    def solve() -> object:
        return cluster_intervals(KINDS[kind](x), len(x), k)

    def error() -> float:
        found = cluster_intervals(KINDS[kind](x), len(x), k)
        if len(found.boundaries) != k + 1 or not (np.diff(found.boundaries) > 0).all():
            return float("inf")
        if not settled(kind, x, found.boundaries):
            return float("inf")
        return abs(found.cost / total(kind, x, found.boundaries) - 1)

    return Candidate(name, solve, error, EXACT)


def settled(kind: str, x: Array, boundaries: Boundaries) -> bool:
    """Return whether no element beside a boundary of sorted values is closer to the neighbouring centre."""
    parts = [x[l:e] for l, e in pairwise(boundaries)]
    centre = np.array([p[len(p) // 2] if kind == "absolute" else p.mean() for p in parts])
    middle = (centre[:-1] + centre[1:]) / 2
    inner, slack = boundaries[1:-1], EXACT * np.abs(x).max()
    return bool((x[inner - 1] <= middle + slack).all() and (x[inner] >= middle - slack).all())


def _growth(options: Options) -> Iterator[Benchmark]:
    """Times over T at k = 8, and over k at one T, as far as each method gets in seconds."""
    half_decades = tuple(int(10**e) for e in np.arange(2, 5.6, 0.5))
    sizes = options.pick((100, 400), (100, 316, 10_000, 100_000), (*half_decades, 3_162_277, 10_000_000))
    for n in sizes:
        yield _deviation(n, 8, 2 if options.quick else 3)
    long = options.pick(400, 100_000)
    for k in options.pick((2,), (2, 32), (2, 4, 16, 32, 64)):
        yield _deviation(long, k, 2 if options.quick else 3)
