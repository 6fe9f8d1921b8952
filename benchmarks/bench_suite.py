"""The suite as pytest-benchmark sees it: one benchmark for every way of every piece of work.

python -m pytest benchmarks/bench_suite.py                      # a quarter of an hour on two cores
python -m pytest benchmarks/bench_suite.py --scale full
python -m pytest benchmarks/bench_suite.py -k "clustering"      # names hold group, case and way
python -m pytest benchmarks/bench_suite.py --reference-repo PATH
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.report.results import Comparison, entry
from benchmarks.suite import Benchmark


def test_way(
    benchmark: Any,
    replay: Any,
    measured: Callable[[Benchmark], Comparison],
    work: Benchmark,
    way: str,
) -> None:
    comparison = measured(work)
    if way in comparison.left_out:
        pytest.skip(f"{way}: {comparison.left_out[way]}")
    found = comparison[way]
    replay.load(found.seconds)
    benchmark.extra_info.update(entry(comparison, found))
    benchmark.pedantic(lambda: None, rounds=len(found.seconds))
