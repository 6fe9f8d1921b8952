"""How everything here is measured: gate first, then interleaved rounds, ratios within a round.

A speed-up of a wrong result is no speed-up: every candidate first shows that its result agrees with the
reference. Candidates then take turns, in a new random order each round, and are compared with the baseline
of the same round, so that a drift of the machine's clock or load falls on all of them. The baseline runs twice
a round; how much the two differ is the noise below which a ratio says nothing.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


class GateError(AssertionError):
    """A candidate's result differs from the reference; nothing is timed."""


@dataclass(frozen=True)
class Candidate:
    """One way of doing the work.

    Attributes:
        name: row label.
        run: does the work once.
        error: relative error of the result against the reference; None for the definition itself.
        tolerance: largest error that passes the gate.
    """

    name: str
    run: Callable[[], object]
    error: Callable[[], float] | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Spread:
    """Median with 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        low, median, high = np.quantile(values, (0.2, 0.5, 0.8))
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Row:
    """What was measured of one candidate: seconds, ratio to the baseline, error at the gate."""

    name: str
    seconds: Spread
    ratio: Spread
    error: float | None


@dataclass(frozen=True)
class Comparison:
    """All candidates of one case; ``noise`` is the ratio of the baseline to itself."""

    case: str
    rounds: int
    noise: Spread
    rows: list[Row]

    def table(self) -> str:
        """Format as a Markdown table of ratios, baseline first."""
        lines = [
            f"### {self.case}",
            "",
            "| way | time / baseline | 20 to 80 % | ms | error |",
            "|---|---|---|---|---|",
        ]
        for row in self.rows:
            error = "" if row.error is None else f"{row.error:.1e}"
            ratio, spread = f"{row.ratio.median:.3f}", f"{row.ratio.low:.3f} to {row.ratio.high:.3f}"
            lines.append(f"| {row.name} | {ratio} | {spread} | {row.seconds.median * 1e3:.2f} | {error} |")
        noise = f"baseline / itself {self.noise.median:.3f} ({self.noise.low:.3f} to {self.noise.high:.3f})"
        return "\n".join([*lines, "", f"{self.rounds} rounds; {noise}", ""])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


Clock: TypeAlias = Callable[[Callable[[], object], int], float]


def wall_clock(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds of one run, the mean of `repeats`, as the caller sees them."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def device_clock(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds of one run on the GPU's own clock: the host's work hides behind the run before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats


def compare(
    case: str,
    baseline: Candidate,
    others: Sequence[Candidate],
    rounds: int,
    warmup: int = 2,
    *,
    clock: Clock = wall_clock,
    least: float = 0.0,
) -> Comparison:
    """Gate all candidates, then time them in interleaved rounds.

    Args:
        case: title.
        baseline: what the others are compared with.
        others: the rest.
        rounds: times that every candidate has its turn.
        warmup: runs of every candidate before the first round.
        clock: what takes the time.
        least: seconds that a turn takes at least; short work is repeated and its mean taken.

    Raises:
        GateError: a candidate's error exceeds its tolerance.
    """
    candidates = [baseline, *others]
    errors = [_gate(candidate) for candidate in candidates]
    repeats = []
    for candidate in candidates:
        for _ in range(warmup):
            candidate.run()
        repeats.append(max(1, math.ceil(least / clock(candidate.run, 1))) if least else 1)
    contenders = [*candidates, baseline]
    repeats.append(repeats[0])
    seconds = np.empty((rounds, len(contenders)))
    shuffle = random.Random(0).shuffle
    order = list(range(len(contenders)))
    for i in range(rounds):
        shuffle(order)
        for j in order:
            seconds[i, j] = clock(contenders[j].run, repeats[j])
    ratios = seconds / seconds[:, :1]
    rows = [
        Row(candidate.name, Spread.of(seconds[:, j]), Spread.of(ratios[:, j]), errors[j])
        for j, candidate in enumerate(candidates)
    ]
    return Comparison(case, rounds, Spread.of(ratios[:, -1]), rows)


def _gate(candidate: Candidate) -> float | None:
    if candidate.error is None:
        return None
    error = candidate.error()
    if not error <= candidate.tolerance:
        raise GateError(
            f"{candidate.name}: expected a relative error <= {candidate.tolerance}, found {error:.3g}"
        )
    return error


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict[str, Any]:
    """Record what the figures depend on: machine and its load, versions, threads, commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,  # above the threads: a busy machine
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "numpy", "triton", "diffusers", "cvxpy", "ecos")
        },
    }


def _git(*arguments: str) -> str | None:
    """Ask git about the repository; None outside one, as in an unpacked source distribution."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(name: str, comparisons: Sequence[Comparison], measured_in: dict[str, Any], **settings: Any) -> Path:
    """Write the comparisons to results/<name>.json and return the path.

    ``measured_in`` is the `environment` as it was before the run: by its end the commit may be another.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "environment": measured_in,
        "settings": settings,
        "comparisons": [asdict(c) for c in comparisons],
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path
