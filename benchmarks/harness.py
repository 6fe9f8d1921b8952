"""How everything here is measured: gate first, then interleaved rounds, ratios within a round.

A speed-up of a wrong result is no speed-up: every candidate first shows that its result agrees with the
reference. Candidates then take turns, in a new random order each round, and are compared with the yardstick
of the same round, so that a drift of the machine's clock or load falls on all of them. The yardstick runs twice
a round; how much the two differ is the noise: a ratio closer to 1 than that shows no difference.

Work by others may fail: a peer that is not installed, refuses the case or gives a wrong result is left out, and
the table gives the reason in place of its figures. If the library's own work fails, so does the measurement.
"""

from __future__ import annotations

import math
import os
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.report.results import Comparison, Role, Way

PACKAGES = (
    "torch", "numpy", "triton", "diffusers", "cvxpy", "ecos", "torchjd", "kmeans1d", "ruptures"
)  # fmt: skip


class GateError(AssertionError):
    """A candidate's result differs from the reference; nothing is timed."""


@dataclass(frozen=True)
class Candidate:
    """One way of doing the work.

    Attributes:
        name: row label.
        run: does the work once.
        error: forms the relative error of the result against the reference; None if there is no gate.
        tolerance: largest error that passes the gate.
        peer: left out with the reason where it fails or is wrong; work by others.
        begin: called with the number of the round before every turn, untimed.
        notes: what else there is to say once it has been timed.
    """

    name: str
    run: Callable[[], object]
    error: Callable[[], float] | None = None
    tolerance: float = 0.0
    peer: bool = False
    begin: Callable[[int], object] | None = None
    notes: Callable[[], dict[str, Any]] | None = None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


Clock: TypeAlias = Callable[[Callable[[], object], int], float]
#: calls a function so many times, one call after the other
Repeat: TypeAlias = Callable[[Callable[[], object], int], object]


def in_a_loop(run: Callable[[], object], times: int) -> None:
    """Call a function so many times."""
    for _ in range(times):
        run()


def wall_clock(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds of one run, the mean of `repeats`, as the caller sees them."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def device_clock(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds of one run on the GPU's clock, without the host's work for it where runs queue up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats


def compare(
    candidates: Sequence[Candidate],
    rounds: int,
    warmup: int = 1,
    *,
    roles: Mapping[str, Role] | None = None,
    group: str = "",
    case: str = "",
    clock: Clock = wall_clock,
    least: float = 0.0,
    allowance: float = math.inf,
    grace: float = 0.0,
    parameters: Mapping[str, Any] | None = None,
    repeat: Repeat = in_a_loop,
) -> Comparison:
    """Gate all candidates, then time them in interleaved rounds.

    Args:
        candidates: the yardstick first.
        rounds: times that every candidate has its turn.
        warmup: runs of every candidate before the first round.
        roles: what the candidates stand for, by name; ``"ours"`` by default.
        group: capability.
        case: title.
        clock: what takes the time.
        least: seconds that a turn takes at least; short work is repeated and its mean taken.
        allowance: a candidate sits a round out while it has taken more than this many times the yardstick's
            time, so that those many times slower do not take nearly all of it. All are in the first round.
        grace: seconds that a candidate may take before that.
        parameters: for `Comparison.parameters`.
        repeat: runs the rounds; pytest-benchmark's way of doing so, which times each round as a whole, or a loop.

    Raises:
        GateError: a candidate's error exceeds its tolerance, and it is no peer.
    """
    gated, left_out = _gate_all(candidates)
    if not gated or gated[0][0] is not candidates[0]:
        raise GateError(f"{case}: expected a yardstick, found {left_out.get(candidates[0].name)}")
    repeats = []
    for candidate, _ in gated:
        for _ in range(warmup):
            candidate.run()
        repeats.append(max(1, math.ceil(least / clock(candidate.run, 1))) if least else 1)
    contenders = [*(candidate for candidate, _ in gated), candidates[0]]
    repeats.append(repeats[0])
    taking_turns = _Rounds(contenders, clock, repeats, allowance, grace)
    repeat(taking_turns.run, rounds)
    seconds, failed = np.array(taking_turns.seconds), taking_turns.failed
    left_out |= failed
    ways = []
    for j, (candidate, error) in enumerate(gated):
        if candidate.name in failed:
            continue
        turns = np.flatnonzero(~np.isnan(seconds[:, j]))
        role = roles[candidate.name] if roles else "ours"
        notes = candidate.notes() if candidate.notes else {}
        taken = tuple(seconds[turns, j].tolist())
        ways.append(Way(candidate.name, role, taken, tuple(turns.tolist()), error, None, notes))
    return Comparison(group, case, tuple(ways), tuple(seconds[:, -1].tolist()), left_out, parameters or {})


class _Rounds:
    """Candidates that take turns, the yardstick first and last in the list and twice a round.

    Attributes:
        seconds: of every round those of all candidates, NaN for one that sat out.
        failed: the peers that failed, with the reason.
    """

    def __init__(
        self,
        contenders: Sequence[Candidate],
        clock: Clock,
        repeats: Sequence[int],
        allowance: float,
        grace: float,
    ) -> None:
        self.seconds: list[list[float]] = []
        self.failed: dict[str, str] = {}
        self._contenders, self._clock, self._repeats = contenders, clock, repeats
        self._allowance, self._grace = allowance, grace
        self._order = list(range(len(contenders)))
        self._shuffle = random.Random(0).shuffle

    def run(self) -> None:
        """Run one round: everyone whose turn it is, in a new order."""
        self._shuffle(self._order)
        number, taking_part = len(self.seconds), self._taking_part()
        self.seconds.append([math.nan] * len(self._contenders))
        for j in self._order:
            contender = self._contenders[j]
            if j not in taking_part or contender.name in self.failed:
                continue
            if contender.begin is not None:
                contender.begin(number)
            try:
                self.seconds[-1][j] = self._clock(contender.run, self._repeats[j])
            except Exception as failure:
                if not contender.peer:
                    raise
                self.failed[contender.name] = _reason(failure)

    def _taking_part(self) -> set[int]:
        if not self.seconds:
            return set(self._order)
        spent = np.nansum(self.seconds, axis=0) * self._repeats
        affordable = spent <= max(self._grace, self._allowance * spent[0])
        return {0, len(self._contenders) - 1, *np.flatnonzero(affordable).tolist()}


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
            left_out[candidate.name] = "; ".join([_reason(failure), *_faults(candidate)])
    return gated, left_out


def _faults(candidate: Candidate) -> list[str]:
    """Return what is known to be wrong with a candidate that is not timed, if it can still say so."""
    try:
        return list(candidate.notes().get("faults", ())) if candidate.notes else []
    except Exception as failure:
        return [f"its faults are not known: {_reason(failure)}"]


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
    """Return the first line of what went wrong, fit for a cell of a table.

    In the long messages of torch.compile it is not the first line that tells, but the error that they quote.
    """
    message = str(failure).strip()
    quoted = re.search(r"\bgot (\w+Error\(.*\))$", message, re.MULTILINE)
    kind = "" if isinstance(failure, ImportError | GateError) else f"{type(failure).__name__}: "
    return (kind + (quoted[1] if quoted else message.partition("\n")[0])).replace("|", "\\|")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment(device: torch.device) -> dict[str, Any]:
    """Record what the figures depend on: machine and its load, versions, threads; no names of hosts or paths."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,  # above the threads: a busy machine
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def commit() -> dict[str, Any]:
    """Record what was measured: the commit, and whether files differ from it."""
    return {
        "id": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
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
