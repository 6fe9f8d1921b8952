"""The gradients of all clusters and nothing else, beside the plain step; and what one operation costs the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.benchmark import Benchmark, Options
from benchmarks.groups import operations
from benchmarks.groups.step import benchmark, settings
from benchmarks.names import TYPICAL_K, Group
from benchmarks.step_implementations import gradient_ways


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    for setting in settings(options):
        if setting.k != TYPICAL_K and not options.full:
            continue
        found = benchmark(Group.GRADIENTS, setting, gradient_ways, options)
        # Memory is measured of the whole step alone.
        yield replace(found, rounds=min(found.rounds, 5), memory=False)
    yield from operations.benchmarks(options)
