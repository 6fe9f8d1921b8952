"""Interval clustering beside kmeans1d, ruptures and the published procedure: ratios, growth with T and k, memory.

    python -m benchmarks.clustering_scaling [--quick]

Writes results/clustering_scaling.json and docs/images/clustering_scaling.png. Every result is compared in cost
with the definition or the peer before its time is taken. Needs the ``bench`` extra and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffmtl_fast._extras import require
from diffmtl_fast.clustering import (
    AbsoluteDeviation,
    IntervalClustering,
    SquaredDeviation,
    cluster_affinity,
    cluster_intervals,
    cluster_snr,
)

from .harness import Candidate, Comparison, GateError, compare, environment, write
from .memory import resident
from .reference.clustering import optimal_intervals, snr_cost

Array = NDArray[np.float64]
PLOT = Path(__file__).parents[1] / "docs" / "images" / "clustering_scaling.png"
KINDS: dict[str, type[AbsoluteDeviation] | type[SquaredDeviation]] = {
    "absolute": AbsoluteDeviation,
    "squared": SquaredDeviation,
}
LABELS = {
    "absolute": "diffmtl_fast, L1",
    "squared": "diffmtl_fast, squared",
    "kmeans1d": "kmeans1d (squared)",
    "ruptures": "ruptures.Dynp (L1)",
    "published": "published procedure (L1)",
}


def normal(n: int) -> Array:
    """Sorted draws of a normal distribution."""
    return np.sort(np.random.default_rng(0).normal(size=n))


def linear_log_snr(n: int) -> Array:
    """log-SNR of the linear schedule."""
    log_signal = np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, n)))
    return log_signal - np.log(-np.expm1(log_signal))


def total(kind: str, x: Array, boundaries: NDArray[np.int64]) -> float:
    """The cost by its definition."""
    cost = 0.0
    for l, e in pairwise(boundaries):
        part = x[l:e]
        centre = part[len(part) // 2] if kind == "absolute" else part.mean()
        cost += float((np.abs(part - centre) if kind == "absolute" else (part - centre) ** 2).sum())
    return cost


def solve(method: str, x: Array, k: int) -> tuple[str, NDArray[np.int64]]:
    """Boundaries by a method, and the kind of cost it minimises."""
    if method in KINDS:
        return method, cluster_intervals(KINDS[method](x), len(x), k).boundaries
    if method == "kmeans1d":
        labels, _ = require("kmeans1d", "bench").cluster(x, k)
        inner = np.flatnonzero(np.diff(labels)) + 1
        return "squared", np.concatenate([[0], inner, [len(x)]])
    if method == "ruptures":
        ruptures = require("ruptures", "bench")
        found = ruptures.Dynp(model="l1", min_size=1, jump=1).fit(x[:, None]).predict(k - 1)
        return "absolute", np.array([0, *found])
    boundaries, _ = optimal_intervals(snr_cost(x), len(x), k)
    return "absolute", np.asarray(boundaries)


def excess(method: str, x: Array, k: int) -> float:
    """How much dearer the method's partition is than ours, relatively; negative if cheaper."""
    kind, boundaries = solve(method, x, k)
    ours = total(kind, x, solve(kind, x, k)[1])
    return total(kind, x, boundaries) / ours - 1.0


def gated(kind: str, x: Array, k: int) -> Candidate:
    """Our solver as a candidate; its error is the relative excess over kmeans1d's cost, or for L1, which that does
    not minimise, over divide and conquer's.
    """

    def error() -> float:
        if kind == "squared":
            other = solve("kmeans1d", x, k)[1]
        else:
            other = cluster_intervals(KINDS[kind](x), len(x), k, solver="divide").boundaries
        return max(0.0, total(kind, x, solve(kind, x, k)[1]) / total(kind, x, other) - 1.0)

    return Candidate(LABELS[kind], lambda: solve(kind, x, k), error, 1e-12)


def ratios(quick: bool) -> list[Comparison]:
    """The comparisons with a bar, each in one run."""
    n = 200 if quick else 1000
    snr = linear_log_snr(n)

    def snr_error() -> float:
        return abs(cluster_snr(snr, 5).cost / optimal_intervals(snr_cost(snr), n, 5)[1] - 1)

    published = Candidate("published procedure", lambda: optimal_intervals(snr_cost(snr), n, 5))
    ours = Candidate("cluster_snr", lambda: cluster_snr(snr, 5), snr_error, 1e-12)
    m = 10_000 if quick else 1_000_000
    x = normal(m)
    peer = Candidate("kmeans1d", lambda: solve("kmeans1d", x, 8))
    return [
        compare(f"log-SNR, T = {n}, k = 5", published, [ours], rounds=2, warmup=1),
        compare(
            f"T = {m}, k = 8",
            peer,
            [gated(kind, x, 8) for kind in KINDS],
            rounds=5,
            warmup=1,
        ),
    ]


def seconds(run: Callable[[], object], least: float = 0.2) -> float:
    """Median time of as many runs as fit into `least` seconds, at least one."""
    times: list[float] = []
    while not times or sum(times) < least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def growth(quick: bool) -> list[dict[str, Any]]:
    """Times over T at k = 8 and over k at T = 10⁵, as far as each method gets in some seconds."""
    top = 4 if quick else 7
    sizes = [int(10**e) for e in np.arange(2, top + 0.1, 0.5)]
    limits = {"absolute": 10**top, "squared": 10**top, "kmeans1d": 10**6, "ruptures": 316, "published": 316}
    cases = [(method, n, 8) for method, limit in limits.items() for n in sizes if n <= limit]
    long = 10_000 if quick else 100_000
    cases += [(method, long, k) for method in ("absolute", "squared", "kmeans1d") for k in (2, 4, 16, 32, 64)]
    cases += [(method, long, k) for method in ("absolute", "squared") for k in (128, 512)]
    rows = []
    for method, n, k in cases:
        x = normal(n)
        # A peer may be less exact, never more; ours are gated against them and each other in `ratios` and tests.
        gate = excess(method, x, k) if method not in KINDS else 0.0
        if gate < -1e-9 or gate > 1e-6:
            raise GateError(f"{LABELS[method]}, T = {n}, k = {k}: expected our cost, found {gate:+.3g} of it")
        took = seconds(lambda method=method, x=x, k=k: solve(method, x, k))  # type: ignore[misc]
        rows.append({"method": method, "T": n, "k": k, "seconds": took, "excess": gate})
        print(f"{LABELS[method]:>26}  T = {n:>8}  k = {k:>4}  {took:10.6f} s", flush=True)
    return rows


def large(n: int, k: int, kind: str) -> dict[str, Any]:
    """Time and memory of one large solve; run in a process of its own."""
    x = normal(n)
    before = resident("VmRSS") / 2**30
    start = time.perf_counter()
    found = cluster_intervals(KINDS[kind](x), n, k)
    took = time.perf_counter() - start
    peak = resident("VmHWM") / 2**30
    error = abs(found.cost / total(kind, x, found.boundaries) - 1)
    if error > 1e-9:
        raise GateError(f"cost of T = {n}, k = {k}: relative error {error:.3g}")
    return {"cost": kind, "T": n, "k": k, "seconds": took, "peak_gib": peak, "before_gib": before}


def in_process(n: int, k: int, kind: str) -> dict[str, Any]:
    """`large` in a fresh process, so that its peak of memory is its own."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--large", str(n), str(k), kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    print(row, flush=True)
    return row


def affinity(n: int) -> dict[str, Any]:
    """Time of the dense programme, gated against the definition."""
    tas = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
    found: IntervalClustering = cluster_affinity(tas, 8)
    spans = pairwise(found.boundaries)
    definition = -math.fsum(float(tas[(l + e) // 2, l:e].astype(np.float64).sum()) for l, e in spans)
    if abs(found.cost - definition) > 1e-9 * abs(definition):
        raise GateError(f"affinity, T = {n}: expected a cost of {definition}, found {found.cost}")
    row = {"T": n, "k": 8, "seconds": seconds(lambda: cluster_affinity(tas, 8), 1.0)}
    print("affinity", row, flush=True)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against T and against k, on logarithmic axes."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    long = max(row["T"] for row in rows if row["k"] != 8)
    for method, label in LABELS.items():
        for axis, key, chosen in (
            (left, "T", [row for row in rows if row["method"] == method and row["k"] == 8]),
            (right, "k", [row for row in rows if row["method"] == method and row["T"] == long]),
        ):
            chosen = sorted(chosen, key=lambda row: row[key])
            if len(chosen) > 1:
                axis.loglog([r[key] for r in chosen], [r["seconds"] for r in chosen], marker=".", label=label)
    left.set(xlabel="number of timesteps T (k = 8)", ylabel="seconds")
    right.set(xlabel=f"number of clusters k (T = {long:,})")
    left.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, nothing written: does it still run?"
    )
    parser.add_argument("--large", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.large:
        n, k, kind = arguments.large
        print(json.dumps(large(int(n), int(k), kind)))
        return
    measured_in = environment()
    comparisons = ratios(arguments.quick)
    for comparison in comparisons:
        print(comparison.table(), flush=True)
    snr = linear_log_snr(1000)
    call = {"T": 1000, "k": 5, "seconds": seconds(lambda: cluster_snr(snr, 5))}
    print("cluster_snr, call after call", call, flush=True)
    affinities = [affinity(n) for n in ([200] if arguments.quick else [1000, 10_000])]
    size, k = (100_000, 100) if arguments.quick else (10_000_000, 1000)
    larges = [in_process(size, k, kind) for kind in KINDS]
    rows = growth(arguments.quick)
    if arguments.quick:
        return
    write(
        "clustering_scaling",
        comparisons,
        measured_in,
        call=call,
        affinity=affinities,
        large=larges,
        growth=rows,
    )
    plot(rows, PLOT)


if __name__ == "__main__":
    main()
