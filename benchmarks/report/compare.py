"""Is a later run slower than an earlier one? Ratios are compared, not seconds: they survive a change of load.

Two runs of the same code differ, too. Within a run, rounds differ: the spread of a ratio over the rounds
and the yardstick's ratio to itself, which has to be 1, say by how much. From run to run all ratios drift a
little, as memory is laid out anew and other work comes and goes: by how much is seen in the ways of others,
whose code is the same. A change has to exceed what both explain, at a level set for the number of ratios
looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffmtl_fast._extras import require

from .results import Comparison, Results, Spread, Way

#: smaller changes are never reported: where code and data happen to lie in memory makes such differences
FLOOR = 0.03
#: how often a change of any ratio may be reported of two runs of the same code
LEVEL = 0.05
#: peak memory has grown if it did by more than this share and by more than so many bytes
MEMORY, MEMORY_BYTES = 0.1, 4 * 2**20
#: settings that choose the cases of a run
CHOOSING = ("scale", "groups", "models", "batch")

_MEDIAN_VARIANCE = math.pi / 2  # of a median over that of a mean, for many normal values; fewer have less
# Variance of the nine tenths of normal values that are closest to their mean, over that of all.
_TRIMMED = 0.623
_EFFICIENCY = 0.75  # degrees of freedom that are left of all
_CHI_SQUARED_80 = 1.6424  # quantile, with one degree of freedom


@dataclass(frozen=True)
class Change:
    """A way of ours in two runs.

    Attributes:
        group, case, way: which.
        before: its time over the yardstick's in the earlier run.
        after: the same in the later run.
        threshold: by how much after / before has to differ from 1 to be called a change: 0.1 for 10 %.
    """

    group: str
    case: str
    way: str
    before: Spread
    after: Spread
    threshold: float

    @property
    def ratio(self) -> float:
        """After / before: above 1 is slower."""
        return self.after.median / self.before.median

    @property
    def regressed(self) -> bool:
        """Whether it is slower by more than the threshold."""
        return math.log(self.ratio) > math.log1p(self.threshold)

    @property
    def improved(self) -> bool:
        """Whether it is faster by more than the threshold."""
        return -math.log(self.ratio) > math.log1p(self.threshold)


@dataclass(frozen=True)
class Growth:
    """Peak memory of a way of ours in two runs, in bytes."""

    group: str
    case: str
    way: str
    before: int
    after: int

    @property
    def regressed(self) -> bool:
        """Whether it takes more, beyond the tolerance."""
        return self.after - self.before > max(MEMORY * self.before, MEMORY_BYTES)

    @property
    def improved(self) -> bool:
        """Whether it takes less, beyond the tolerance."""
        return self.before - self.after > max(MEMORY * self.before, MEMORY_BYTES)


@dataclass(frozen=True)
class Changes:
    """What a comparison of two runs found.

    Attributes:
        times: of all our ways that both runs have.
        memory: of those whose peak both measured.
        missing: what only the earlier run has; it counts as a regression.
        apart: reason to cases that cannot be compared.
        differing: settings and versions that differ, with both values.
        drift: by how much the others' ratios moved from run to run beyond what the rounds explain, as a standard
            deviation: 0.1 for 10 %.
    """

    times: tuple[Change, ...]
    memory: tuple[Growth, ...]
    missing: tuple[str, ...]
    apart: Mapping[str, tuple[str, ...]]
    differing: tuple[str, ...]
    drift: float

    @property
    def regressed(self) -> bool:
        """Whether anything became slower, takes more memory or is no longer measured."""
        slower = any(change.regressed for change in self.times)
        return bool(self.missing) or slower or any(growth.regressed for growth in self.memory)


def changes(before: Results, after: Results) -> Changes:
    """Compare what both runs measured.

    A change d is the difference between the medians of a ratio's logarithm in the two runs. It is called
    one beyond √((t e)² + (z τ)²). e² = s² π/2 (1/n + 1/n') is the variance of d for medians of n and n'
    rounds; s², without the largest tenth, pools the ratio's spread in either run and the yardstick's ratio
    to itself about 1. τ is the drift from run to run, see `Changes.drift`. t and z are quantiles of
    Student's distribution, with the degrees of freedom of s², and of the normal one, at `LEVEL` divided by
    the number of ratios (Bonferroni), on both sides.

    Raises:
        ValueError: the runs are of different devices, whose ratios differ for reasons of their own.
    """
    if _device(before) != _device(after):
        raise ValueError(f"expected two runs of one device, found {_device(before)!r} and {_device(after)!r}")
    missing: list[str] = []
    apart: dict[str, list[str]] = {}
    pairs = []
    for old in before.comparisons:
        new = after.find(old.group, old.case)
        reason = _obstacle(before, after, old, new)
        if reason:
            apart.setdefault(reason, []).append(f"{old.group}: {old.case}")
        elif new is None or new.yardstick.name != old.yardstick.name:
            missing += [_name(old, way) for way in old.of("ours")]
        else:
            missing += [_name(old, way) for way in old.of("ours") if way.name not in new]
            pairs.append((old, new))
    drift = _drift(pairs)
    return Changes(
        _times(pairs, drift),
        _memory(pairs),
        tuple(missing),
        {reason: tuple(cases) for reason, cases in apart.items()},
        tuple(_differing(before, after)),
        drift,
    )


def _device(run: Results) -> str:
    return str(run.environment["gpu"] or run.environment["cpu"])


def _name(comparison: Comparison, way: Way) -> str:
    return f"{comparison.group}: {comparison.case}: {way.name}"


def _obstacle(before: Results, after: Results, old: Comparison, new: Comparison | None) -> str | None:
    """Return why a case cannot be compared, or nothing; one that is gone for no such reason is missing."""
    if before.environment["threads"] != after.environment["threads"]:
        return _both("threads", before.environment["threads"], after.environment["threads"])
    if new is None:
        chosen = _unequal(before.settings, after.settings, CHOOSING)
        return f"not in the later run ({', '.join(chosen)})" if chosen else None
    return ", ".join(_unequal(old.parameters, new.parameters, sorted({*old.parameters, *new.parameters})))


def _differing(before: Results, after: Results) -> list[str]:
    keys = sorted({*before.settings, *after.settings} - {"device"})
    old, new = before.environment, after.environment
    packages = sorted({*old["versions"], *new["versions"]})
    return [
        *_unequal(before.settings, after.settings, keys),
        *_unequal(old, new, ("threads", "python")),
        *_unequal(old["versions"], new["versions"], packages),
    ]


def _unequal(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [_both(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _both(name: str, old: object, new: object) -> str:
    return f"{name} {old}, then {new}"


_Pairs = Sequence[tuple[Comparison, Comparison]]


def _times(pairs: _Pairs, drift: float) -> tuple[Change, ...]:
    ours = [
        (old, new, way)
        for old, new in pairs
        for way in old.of("ours")
        if way.name in new and way.name != old.yardstick.name
    ]
    found = []
    special = require("scipy.special", "train")
    level = 1 - LEVEL / (2 * max(len(ours), 1))
    for old, new, way in ours:
        _, variance, freedom = _moved(old, new, way.name)
        rounds, runs = special.stdtrit(freedom, level) * math.sqrt(variance), special.ndtri(level) * drift
        threshold = max(math.expm1(math.hypot(rounds, runs)), FLOOR)
        ratios = old.ratio(way), new.ratio(new[way.name])
        found.append(Change(old.group, old.case, way.name, *ratios, threshold))
    return tuple(found)


def _moved(old: Comparison, new: Comparison, name: str) -> tuple[float, float, float]:
    """Return by how much a log-ratio moved, its variance for the rounds' sake, and the degrees of freedom."""
    ratios = [np.log(run.ratios(run[name])) for run in (old, new)]
    controls = np.log(np.concatenate([np.divide(run.again, run.yardstick.seconds) for run in (old, new)]))
    own = np.concatenate([values - np.median(values) for values in ratios])
    freedom = len(own) - 2 + len(controls)
    # Where a way spreads more than the yardstick does, its own variance counts, not the smaller one of both.
    square = max(_square(np.concatenate([own, controls]), freedom), _square(own, len(own) - 2))
    variance = _MEDIAN_VARIANCE * square * sum(1 / len(values) for values in ratios)
    return float(np.median(ratios[1]) - np.median(ratios[0])), variance, _EFFICIENCY * freedom


def _square(deviations: NDArray[np.float64], freedom: int) -> float:
    """Return the variance without the largest tenth: disturbed rounds, which medians ignore, too."""
    if freedom < 1:
        return 0.0
    kept = np.sort(deviations**2)[: round(0.9 * len(deviations))]
    return float(kept.mean()) / _TRIMMED * len(deviations) / freedom


def _drift(pairs: _Pairs) -> float:
    """Return the least τ with which 80 % of the others' d² / (e² + τ²) are within what normal values have."""
    others = [
        _moved(old, new, way.name)
        for old, new in pairs
        for way in old.ways[1:]
        if way.role != "ours" and way.name in new
    ]
    if not others:
        return 0.0
    moved, variances = np.array([d**2 for d, _, _ in others]), np.array([v for _, v, _ in others])
    # The half with the quieter rounds shows the drift best. Too small a variance of the rounds makes the drift
    # seem larger, which is the cautious side.
    quiet = variances <= np.median(variances)
    moved, variances = moved[quiet], variances[quiet] / _MEDIAN_VARIANCE
    low, high = 0.0, float(moved.max()) / _CHI_SQUARED_80
    for _ in range(50):  # the share of 80 % grows as the drift does
        middle = (low + high) / 2
        enough = np.quantile(moved / np.maximum(variances + middle, 1e-300), 0.8) <= _CHI_SQUARED_80
        low, high = (low, middle) if enough else (middle, high)
    return math.sqrt(high)


def _memory(pairs: _Pairs) -> tuple[Growth, ...]:
    return tuple(
        Growth(old.group, old.case, way.name, way.memory, new[way.name].memory or 0)
        for old, new in pairs
        for way in old.of("ours")
        if way.memory is not None and way.name in new and new[way.name].memory is not None
    )


def table(found: Changes) -> str:
    """Format as Markdown: what differs, slowest first, how many do not, and what was not compared."""
    times = sorted((c for c in found.times if c.regressed or c.improved), key=lambda change: -change.ratio)
    memory = [growth for growth in found.memory if growth.regressed or growth.improved]
    lines = []
    if times or memory:
        lines += [
            "| | way | before | after | after / before | called one beyond |",
            "|---|---|---|---|---|---|",
        ]
    for change in times:
        word = "slower" if change.regressed else "faster"
        lines.append(
            f"| {change.group}: {change.case} | {change.way} | {change.before.median:.4g} | "
            f"{change.after.median:.4g} | {change.ratio:.3f} ({word}) | {change.threshold:.1%} |"
        )
    for growth in memory:
        word = "more" if growth.regressed else "less"
        before, after = (f"{size / 2**20:,.1f} MiB" for size in (growth.before, growth.after))
        ratio = f"{growth.after / growth.before:.3f} ({word} memory)" if growth.before else f"({word} memory)"
        lines.append(
            f"| {growth.group}: {growth.case} | {growth.way} | {before} | {after} | {ratio} | {MEMORY:.0%} |"
        )
    lines += [""] if lines else []
    lines += [f"No longer measured: {name}" for name in found.missing]
    lines += [f"Not compared, {reason}: {'; '.join(cases)}" for reason, cases in found.apart.items()]
    lines += [f"The runs differ in: {'; '.join(found.differing)}."] if found.differing else []
    same, peaks = len(found.times) - len(times), len(found.memory) - len(memory)
    lines.append(
        f"{same} of {len(found.times)} ratios differ by no more than in two runs of the same code; those of "
        f"others drifted by {found.drift:.1%} between the runs. {peaks} of {len(found.memory)} peaks of memory "
        f"are within {MEMORY:.0%}."
    )
    return "\n".join(lines)
