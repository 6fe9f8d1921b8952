"""Everything that a run of the suite measures: the cases of all groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.benchmark import Benchmark, Options
from benchmarks.groups import (
    affinity,
    clustering,
    compiled,
    distributed,
    end_to_end,
    fused_ops,
    gradients,
    step,
    weights,
)
from benchmarks.names import Group

GROUPS: dict[Group, Callable[[Options], Iterator[Benchmark]]] = {
    Group.CLUSTERING: clustering.benchmarks,
    Group.OPS: fused_ops.benchmarks,
    Group.WEIGHTS: weights.benchmarks,
    Group.GRADIENTS: gradients.benchmarks,
    Group.STEP: step.benchmarks,
    Group.COMPILED: compiled.benchmarks,
    Group.DISTRIBUTED: distributed.benchmarks,
    Group.AFFINITY: affinity.benchmarks,
    Group.TRAINING: end_to_end.benchmarks,
}


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of the chosen groups, with as many rounds as the options say, and memory only if they do."""
    for group, cases in GROUPS.items():
        if options.groups is not None and group.key not in options.groups:
            continue
        for benchmark in cases(options):
            rounds = benchmark.rounds if options.rounds is None else options.rounds
            yield replace(benchmark, rounds=rounds, memory=benchmark.memory and options.memory)
