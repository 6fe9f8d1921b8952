"""Times of interleaved rounds, and the JSON files of pytest-benchmark that hold them.

A file is pytest-benchmark's own, one entry per way of doing a piece of work. ``extra_info`` of an entry says which
comparison it belongs to and in which rounds it had its turn, so that ratios can be formed within a round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

#: what a way stands for: the least that any could take, this library, the published procedure, what an expert
#: writes by hand or with a compiler, another library
Role = Literal["limit", "ours", "reference", "baseline", "peer"]
ROLES: tuple[Role, ...] = ("limit", "ours", "reference", "baseline", "peer")
FORMAT = 1


@dataclass(frozen=True)
class Spread:
    """Median with 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.float64]) -> Spread:
        """Summarise values, at least one."""
        low, median, high = np.quantile(values, (0.2, 0.5, 0.8))
        return cls(float(median), float(low), float(high))

    def over(self, numerator: float) -> Spread:
        """Return numerator / value."""
        return Spread(numerator / self.median, numerator / self.high, numerator / self.low)

    def __truediv__(self, denominator: float) -> Spread:
        return Spread(self.median / denominator, self.low / denominator, self.high / denominator)


@dataclass(frozen=True)
class Way:
    """What was measured of one way of doing the work.

    Attributes:
        name: label of its row.
        role: what it stands for.
        seconds: time of every run.
        turns: the number of the round that each of these times was taken in.
        error: relative error at the gate; None if there was none.
        memory: peak bytes above what was held before, where they were measured.
        notes: further findings, for example how many iterations a training took.
    """

    name: str
    role: Role
    seconds: tuple[float, ...]
    turns: tuple[int, ...]
    error: float | None = None
    memory: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def time(self) -> Spread:
        """Seconds of a run."""
        return Spread.of(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """All ways of doing one piece of work, timed in turns; the first is the yardstick of the others.

    Attributes:
        group: the capability.
        case: the piece of work, unique in its group.
        ways: what was measured.
        again: the yardstick's second time in every round.
        left_out: ways without figures, and why.
        parameters: what sets this case apart from the others of its group.
    """

    group: str
    case: str
    ways: tuple[Way, ...]
    again: tuple[float, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Way:
        for way in self.ways:
            if way.name == name:
                return way
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(way.name == name for way in self.ways)

    @property
    def yardstick(self) -> Way:
        """What the others' times are divided by."""
        return self.ways[0]

    @property
    def rounds(self) -> int:
        """How many there were; a slow way took part in fewer."""
        return len(self.again)

    def of(self, role: Role) -> list[Way]:
        """Return the ways of a role."""
        return [way for way in self.ways if way.role == role]

    def ratio(self, way: Way, over: Way | None = None) -> Spread:
        """Return a way's time over another's, by default the yardstick's, in the same rounds."""
        return Spread.of(self.ratios(way, over))

    def ratios(self, way: Way, over: Way | None = None) -> NDArray[np.float64]:
        """Return what `ratio` summarises, one for each round in which both had their turn.

        Every way is in the first round, so that there is one such round at least.
        """
        times = dict(zip(way.turns, way.seconds, strict=True))
        over = self.yardstick if over is None else over
        others = dict(zip(over.turns, over.seconds, strict=True))
        return np.array([times[turn] / others[turn] for turn in sorted(times.keys() & others.keys())])

    @property
    def repeat(self) -> Spread:
        """The yardstick's time over its own in the same round."""
        return Spread.of(np.divide(self.again, self.yardstick.seconds))

    @property
    def noise(self) -> float:
        """By how much a ratio has to differ from 1 to mean something: 0.1 for 10 %.

        That is how far the 20 % or the 80 % quantile of the yardstick over itself is from 1, upwards or downwards.
        """
        repeat = self.repeat
        return max(repeat.high, 1.0 / repeat.low, 1.0) - 1.0

    def differs(self, ratio: Spread) -> bool:
        """Return whether a ratio differs from 1 by more than the noise, and 1 is not between its quantiles."""
        beyond = abs(math.log(ratio.median)) > math.log1p(self.noise)
        return beyond and not ratio.low <= 1.0 <= ratio.high


@dataclass(frozen=True)
class Results:
    """What one file holds.

    Attributes:
        environment: the machine, its versions and its load, without names of hosts or paths.
        commit: of the repository; None if it was not under git.
        settings: of the run.
        comparisons: in the order in which they were measured.
        name: of the file, without its ending.
    """

    environment: Mapping[str, Any]
    commit: str | None
    settings: Mapping[str, Any]
    comparisons: tuple[Comparison, ...]
    name: str = ""

    @property
    def machine(self) -> str:
        """The machine in a few words."""
        environment = self.environment
        if environment.get("gpu"):
            return str(environment["gpu"])
        return f"{environment['cpu']}, {environment['threads']} threads"

    @property
    def device(self) -> str:
        """What the work was done on: "cpu" or "cuda"."""
        return str(self.settings["device"]).split(":")[0]

    @property
    def busy(self) -> bool:
        """Whether other work already filled the machine when the run began."""
        load = self.environment["load"]
        return bool(load) and load[0] > self.environment["threads"]

    @property
    def origin(self) -> str:
        """When the run was made, of what, and whether the machine did other work."""
        date, commit = self.environment["date"][:10], (self.commit or "unknown")[:10]
        return f"{date}, commit {commit}" + (", beside other work" if self.busy else "")

    def find(self, group: str, case: str) -> Comparison | None:
        """Return a comparison, or None."""
        return next((c for c in self.comparisons if (c.group, c.case) == (group, case)), None)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file.

        Raises:
            ValueError: the file is not one of the benchmark suite's.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = record["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the JSON of a benchmark run, found another file") from error
        if found != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, found {found}")
        return cls(
            record["machine_info"],
            record["commit_info"]["id"],
            record["settings"],
            tuple(_comparisons(record["benchmarks"], record["left_out"])),
            path.stem,
        )


@dataclass(frozen=True)
class Machine:
    """What all runs of one machine measured.

    Attributes:
        runs: the earliest first; of a case that several have, the latest one's is taken.
    """

    runs: tuple[Results, ...]

    @property
    def title(self) -> str:
        """The machine in a few words."""
        return self.runs[0].machine

    @property
    def name(self) -> str:
        """The name of the file that holds most."""
        return max(self.runs, key=lambda run: len(run.comparisons)).name

    @property
    def device(self) -> str:
        """What the work was done on: "cpu" or "cuda"."""
        return self.runs[0].device

    @cached_property
    def _latest(self) -> dict[tuple[str, str], tuple[Results, Comparison]]:
        found = {(c.group, c.case): (run, c) for run in self.runs for c in run.comparisons}
        groups = dict.fromkeys(group for group, _ in found)
        return {key: found[key] for group in groups for key in found if key[0] == group}

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every case once, those of a group together."""
        return tuple(comparison for _, comparison in self._latest.values())

    def run_of(self, comparison: Comparison) -> Results:
        """Return the run that a comparison comes from, for its commit, date and settings."""
        return self._latest[comparison.group, comparison.case][0]


def machines(results: Iterable[Results]) -> list[Machine]:
    """Put together the runs of each machine, which is one device with one number of threads."""
    found: dict[str, list[Results]] = {}
    for run in results:
        found.setdefault(run.machine, []).append(run)
    return [Machine(tuple(sorted(runs, key=lambda run: run.environment["date"]))) for runs in found.values()]


def entry(comparison: Comparison, way: Way) -> dict[str, Any]:
    """Return ``extra_info`` of a way: all but its group and its times."""
    info: dict[str, Any] = {
        "case": comparison.case,
        "way": way.name,
        "role": way.role,
        "turns": list(way.turns),
        "error": way.error,
        "memory": way.memory,
        "notes": dict(way.notes),
    }
    if way is comparison.yardstick:
        info |= {"again": list(comparison.again), "parameters": dict(comparison.parameters)}
    return info


def _comparisons(
    entries: Iterable[Mapping[str, Any]], left_out: Iterable[Mapping[str, str]]
) -> Iterable[Comparison]:
    cases: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for found in entries:
        cases.setdefault((found["group"], found["extra_info"]["case"]), []).append(found)
    reasons: dict[tuple[str, str], dict[str, str]] = {}
    for missing in left_out:
        reasons.setdefault((missing["group"], missing["case"]), {})[missing["way"]] = missing["reason"]
    for (group, case), ways in cases.items():
        ways.sort(key=lambda found: "again" not in found["extra_info"])  # the yardstick first
        first = ways[0]["extra_info"]
        if "again" not in first:
            continue  # the run was cut short in the middle of this case
        yield Comparison(
            group,
            case,
            tuple(_way(found) for found in ways),
            tuple(first["again"]),
            reasons.get((group, case), {}),
            first["parameters"],
        )


def _way(found: Mapping[str, Any]) -> Way:
    info = found["extra_info"]
    return Way(
        info["way"],
        info["role"],
        tuple(found["stats"]["data"]),
        tuple(info["turns"]),
        info["error"],
        info["memory"],
        info["notes"],
    )
