"""Is a later run slower than an earlier one? Ratios are compared, not seconds: they survive a change of load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .results import Comparison, Results, Spread, Way

#: a change below this is never called one: layout of code and memory alone make such differences
FLOOR = 0.03


@dataclass(frozen=True)
class Change:
    """A way of ours in two runs.

    Attributes:
        group, case, way: which.
        before: its time over the yardstick's in the earlier run.
        after: the same in the later run.
        noise: by how much after / before has to differ from 1 to mean something.
    """

    group: str
    case: str
    way: str
    before: Spread
    after: Spread
    noise: float

    @property
    def ratio(self) -> float:
        """After / before: above 1 is slower."""
        return self.after.median / self.before.median

    @property
    def regressed(self) -> bool:
        """Whether it is slower by more than the noise."""
        return math.log(self.ratio) > math.log1p(self.noise)

    @property
    def improved(self) -> bool:
        """Whether it is faster by more than the noise."""
        return -math.log(self.ratio) > math.log1p(self.noise)


def changes(before: Results, after: Results) -> tuple[list[Change], list[str]]:
    """Compare what both runs measured.

    Returns:
        The changes of all our ways, and those that only the earlier run has: what can no longer be measured is no
        improvement.

    Raises:
        ValueError: the runs are of different machines, whose ratios differ for reasons of their own.
    """
    if before.machine != after.machine:
        raise ValueError(f"expected two runs of one machine, found {before.machine!r} and {after.machine!r}")
    found, missing = [], []
    for old in before.comparisons:
        new = after.find(old.group, old.case)
        for way in old.of("ours"):
            if new is None or way.name not in new or new.yardstick.name != old.yardstick.name:
                missing.append(f"{old.group}: {old.case}: {way.name}")
            elif way.name != old.yardstick.name:
                found.append(_change(old, new, way))
    return found, missing


def _change(old: Comparison, new: Comparison, way: Way) -> Change:
    before, after = old.ratio(way), new.ratio(new[way.name])
    # Both runs err, each by its own noise or by the spread of the ratio itself, whichever is larger.
    noise = (1 + max(old.noise, _width(before))) * (1 + max(new.noise, _width(after))) - 1
    return Change(old.group, old.case, way.name, before, after, max(noise, FLOOR))


def _width(ratio: Spread) -> float:
    return max(ratio.high / ratio.median, ratio.median / ratio.low) - 1


def table(found: Sequence[Change], missing: Sequence[str]) -> str:
    """Format as Markdown: what differs, slowest first, and how many do not."""
    told = sorted((c for c in found if c.regressed or c.improved), key=lambda change: -change.ratio)
    lines = []
    if told:
        lines += ["| | way | before | after | after / before | noise |", "|---|---|---|---|---|---|"]
    for change in told:
        word = "slower" if change.regressed else "faster"
        lines.append(
            f"| {change.group}: {change.case} | {change.way} | {change.before.median:.4g} | "
            f"{change.after.median:.4g} | {change.ratio:.3f} ({word}) | {change.noise:.1%} |"
        )
    lines += [f"No longer measured: {name}" for name in missing]
    same = len(found) - len(told)
    return "\n".join(
        [*lines, "", f"{same} of {len(found)} ratios differ by no more than the noise."]
    ).lstrip()
