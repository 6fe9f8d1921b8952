"""The suite as pytest-benchmark sees it: one benchmark for every case, whose rounds it runs and times.

In a round all ways of the case take their turns, each timed on its own by `harness.compare`.

python -m pytest benchmarks/bench_suite.py                      # a quarter of an hour on two cores
python -m pytest benchmarks/bench_suite.py --scale full
python -m pytest benchmarks/bench_suite.py --groups step,weights
python -m pytest benchmarks/bench_suite.py -k "clustering"      # names of groups, cases and ways
python -m pytest benchmarks/bench_suite.py --reference-repo PATH
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.benchmark import Benchmark
from benchmarks.harness import Repeat


def test_case(benchmark: Any, measured: Callable[[Benchmark, Repeat], None], work: Benchmark) -> None:
    def repeat(one_round: Callable[[], object], rounds: int) -> None:
        benchmark.pedantic(one_round, rounds=rounds)

    measured(work, repeat)
