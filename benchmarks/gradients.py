"""The gradients of all clusters and nothing else, beside the plain step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.step import TYPICAL_K, benchmark, settings
from benchmarks.suite import Benchmark, Options
from benchmarks.ways import gradient_ways

GROUP = "per-cluster gradients"


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    for setting in settings(options):
        if setting.k != TYPICAL_K and not options.full:
            continue
        found = benchmark(GROUP, setting, gradient_ways(), options)
        # Memory is looked at where the whole step is.
        yield replace(found, rounds=options.pick(2, 3, 5) if found.rounds > 3 else found.rounds, memory=False)
