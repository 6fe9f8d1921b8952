"""One training step with torch.compile, beside the plain step and the best without it.

The compiler takes minutes for each model. Without a GPU the group is therefore measured in a full run alone, or
where ``--groups`` names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.benchmark import Benchmark, Options
from benchmarks.groups.step import benchmark, settings
from benchmarks.names import MANY_K, TYPICAL_K, Group
from benchmarks.step_implementations import compiled_ways

KS = (TYPICAL_K, MANY_K)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    asked_for = Group.COMPILED.key in (options.groups or ())
    if not options.compile or options.quick or not (options.gpu or options.full or asked_for):
        return
    chosen = [setting for setting in settings(options) if setting.k == TYPICAL_K]
    if not (options.gpu or options.models):
        chosen.append(replace(chosen[0], model="small-unet"))  # the time of small operations shows most
    for setting in chosen:
        if setting.batch == chosen[0].batch:
            for k in KS:
                case = benchmark(Group.COMPILED, replace(setting, k=k), compiled_ways, options)
                yield replace(case, memory=False)
