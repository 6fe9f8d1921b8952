"""How everything here is measured: gate first, then interleaved rounds, ratios within a round.

A speed-up of a wrong result is no speed-up: every candidate first shows that its result agrees with the
reference. Candidates then take turns, in a new random order each round, and are compared with the baseline
of the same round, so that a drift of the machine's clock or load falls on all of them. The baseline runs twice
a round; how much the two differ is the noise below which a ratio says nothing.

Work by others may fail: a peer that is not installed, refuses the case or gives a wrong result is left out, and
the reason stands where its figures would. What is ours must not.
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
from dataclasses import asdict, dataclass, field
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
        peer: work by others, left out with the reason where it fails or is wrong.
    """

    name: str
    run: Callable[[], object]
    error: Callable[[], float] | None = None
    tolerance: float = 0.0
    peer: bool = False


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
    """What was measured of one candidate.

    Attributes:
        name: the candidate's.
        seconds: time of a run.
        ratio: that time over the baseline's in the same round.
        error: relative error at the gate.
        runs: how many were timed.
        memory: peak bytes above what was held before, where they were measured.
    """

    name: str
    seconds: Spread
    ratio: Spread
    error: float | None
    runs: int = 0
    memory: int | None = None


@dataclass(frozen=True)
class Comparison:
    """All candidates of one case, the baseline first.

    Attributes:
        case: heading.
        rounds: how many there were; a slow candidate took part in fewer.
        noise: the ratio of the baseline to itself.
        rows: what was measured.
        left_out: candidates without figures, and why.
        parameters: what sets this case apart from the others of the run.
    """

    case: str
    rounds: int
    noise: Spread
    rows: list[Row]
    left_out: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Format as a Markdown table of ratios, baseline first."""
        lines = [
            f"### {self.case}",
            "",
            "| way | time / baseline | 20 to 80 % | ms | runs | peak MiB | error |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            error = "" if row.error is None else f"{row.error:.1e}"
            memory = "" if row.memory is None else f"{row.memory / 2**20:.0f}"
            ratio, spread = f"{row.ratio.median:.3f}", f"{row.ratio.low:.3f} to {row.ratio.high:.3f}"
            time = f"{row.seconds.median * 1e3:.2f}"
            lines.append(f"| {row.name} | {ratio} | {spread} | {time} | {row.runs} | {memory} | {error} |")
        lines += [f"| {name} | {reason} | | | | | |" for name, reason in self.left_out.items()]
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
    allowance: float = math.inf,
    **parameters: Any,
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
        allowance: a candidate sits a round out while it has taken more than this many times the baseline's
            time, so that those many times slower do not take nearly all of it. All are in the first round.
        **parameters: for `Comparison.parameters`.

    Raises:
        GateError: a candidate's error exceeds its tolerance, and it is no peer.
    """
    gated, left_out = _gate_all([baseline, *others])
    repeats = []
    for candidate, _ in gated:
        for _ in range(warmup):
            candidate.run()
        repeats.append(max(1, math.ceil(least / clock(candidate.run, 1))) if least else 1)
    contenders = [*(candidate for candidate, _ in gated), baseline]
    repeats.append(repeats[0])
    again = len(gated)
    seconds = np.full((rounds, len(contenders)), np.nan)
    shuffle = random.Random(0).shuffle
    order = list(range(len(contenders)))
    for i in range(rounds):
        shuffle(order)
        spent = np.nansum(seconds, axis=0)
        for j in order:
            if i == 0 or j in (0, again) or spent[j] <= allowance * spent[0]:
                seconds[i, j] = clock(contenders[j].run, repeats[j])
    rows = [
        _row(candidate.name, seconds[:, j], seconds[:, 0], error)
        for j, (candidate, error) in enumerate(gated)
    ]
    return Comparison(case, rounds, Spread.of(seconds[:, again] / seconds[:, 0]), rows, left_out, parameters)


def _row(name: str, seconds: np.ndarray, baseline: np.ndarray, error: float | None) -> Row:
    took_part = ~np.isnan(seconds)
    seconds, baseline = seconds[took_part], baseline[took_part]
    return Row(name, Spread.of(seconds), Spread.of(seconds / baseline), error, len(seconds))


def _gate_all(
    candidates: Sequence[Candidate],
) -> tuple[list[tuple[Candidate, float | None]], dict[str, str]]:
    """Return the candidates with their errors, and the peers that fail with the reason."""
    gated, left_out = [], {}
    for candidate in candidates:
        try:
            gated.append((candidate, _gate(candidate)))
        except Exception as failure:
            if not candidate.peer:
                raise
            left_out[candidate.name] = _reason(failure)
    return gated, left_out


def _gate(candidate: Candidate) -> float | None:
    if candidate.error is None:
        return None
    error = candidate.error()
    if not error <= candidate.tolerance:
        raise GateError(
            f"{candidate.name}: expected a relative error <= {candidate.tolerance}, found {error:.3g}"
        )
    return error


def _reason(failure: Exception) -> str:
    """Return the first line of what went wrong, fit for a cell of a table."""
    message = str(failure).strip().splitlines() or [""]
    kind = "" if isinstance(failure, ImportError | GateError) else f"{type(failure).__name__}: "
    return (kind + message[0]).replace("|", "\\|")


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
            name: _version(name)
            for name in ("torch", "numpy", "triton", "diffusers", "cvxpy", "ecos", "torchjd")
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


def write(
    name: str,
    comparisons: Sequence[Comparison],
    measured_in: dict[str, Any],
    folder: Path | None = None,
    **settings: Any,
) -> Path:
    """Write the comparisons to <name>.json in a folder, by default results/, and return the path.

    ``measured_in`` is the `environment` as it was before the run: by its end the commit may be another.
    """
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {
        "environment": measured_in,
        "settings": settings,
        "comparisons": [asdict(c) for c in comparisons],
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path
