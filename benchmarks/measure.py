"""Measuring one benchmark: the times of all its ways, and their peak memory."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import torch

from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Repeat, compare, in_a_loop
from benchmarks.memory import LeftOut, in_fresh_process, peak_of
from benchmarks.report.results import Comparison


def measure(benchmark: Benchmark, options: Options, repeat: Repeat = in_a_loop) -> Comparison:
    """Gate and time all ways, and measure their memory.

    Args:
        benchmark: what to measure.
        options: of the run.
        repeat: runs the rounds, as in `compare`.
    """
    _free_memory(options)
    memory = _peaks(benchmark, options) if benchmark.memory else {}
    torch.manual_seed(0)
    found = compare(
        benchmark.candidates(),
        benchmark.rounds,
        benchmark.warmup,
        roles=benchmark.ways,
        group=benchmark.group,
        case=benchmark.case,
        clock=benchmark.clock,
        least=benchmark.least,
        allowance=benchmark.allowance,
        grace=benchmark.grace,
        parameters=benchmark.parameters,
        repeat=repeat,
    )
    ways = tuple(replace(way, memory=memory.get(way.name)) for way in found.ways)
    return replace(found, ways=ways, left_out={**found.left_out, **benchmark.absent})


def _free_memory(options: Options) -> None:
    """Free what an earlier benchmark held, compiled code included."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if options.gpu:
        torch.cuda.empty_cache()


def _peaks(benchmark: Benchmark, options: Options) -> dict[str, int]:
    """Return the peak memory of every way; those that fail have none.

    Each is measured in a process of its own, but on a GPU in this one: what other ways have allocated does not
    count there, and every process would first set up the device.
    """
    found = {}
    for name in benchmark.ways:
        work = benchmark.build, name, torch.device(options.device)
        try:
            found[name] = peak_of(*work) if options.gpu else in_fresh_process(peak_of, *work)
        except LeftOut as failure:
            print(f"{name}: no peak memory, {failure}", flush=True)
        _free_memory(options)
    return found
