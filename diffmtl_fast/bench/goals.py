"""What the library set out to reach: ratios to other ways, a few times, and one size of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .results import Comparison, Results, Spread

Measure = Literal["ratio", "share", "seconds", "gib"]


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        title: what it is.
        group: of its comparisons.
        where: parameters that a comparison must have.
        ways: ours, of which the best counts.
        bar: what has to be reached.
        stretch: what would be better still.
        over: the way that a ratio is formed with, the yardstick if not given.
        measure: a ratio of times, a share of the limit's speed, seconds, or GiB at the peak.
        device: "cpu" or "cuda" if it is for one alone.
    """

    title: str
    group: str
    ways: tuple[str, ...]
    bar: float
    stretch: float
    where: Mapping[str, Any] = field(default_factory=dict)
    over: str | None = None
    measure: Measure = "ratio"
    device: str | None = None

    def met(self, value: float) -> bool:
        """Return whether the bar is reached; of a share, more is better."""
        return value >= self.bar if self.measure == "share" else value <= self.bar

    @property
    def bar_text(self) -> str:
        """The bar as it is read."""
        return self._text(self.bar)

    @property
    def stretch_text(self) -> str:
        """The stretch as it is read."""
        return self._text(self.stretch)

    def _text(self, value: float) -> str:
        if self.measure == "seconds":
            return f"≤ {value:g} s" if value >= 0.1 else f"≤ {value * 1e3:g} ms"
        if self.measure == "gib":
            return f"≤ {value:g} GiB"
        if self.measure == "share":
            return f"≥ {value:g}"
        return f"≤ {value:g}" if value >= 0.2 else f"≤ 1/{1 / value:.0f}"

    def concerns(self, group: str, parameters: Mapping[str, Any], device: str) -> bool:
        """Return whether a comparison is one of this goal's."""
        if group != self.group or self.device not in (None, device):
            return False
        return all(parameters.get(key) == value for key, value in self.where.items())

    def value(self, comparison: Comparison) -> Spread | None:
        """Return the best that was reached; None if it was not measured."""
        found = [self._of(comparison, name) for name in self.ways if name in comparison]
        there = [spread for spread in found if spread is not None]
        if not there:
            return None
        best = max if self.measure == "share" else min
        return best(there, key=lambda spread: spread.median)

    def _of(self, comparison: Comparison, name: str) -> Spread | None:
        way = comparison[name]
        if self.measure == "seconds":
            return way.time
        if self.measure == "gib":
            return None if way.memory is None else Spread(*(way.memory / 2**30,) * 3)
        if self.measure == "share":
            return share(comparison, name)
        if self.over is None:
            return comparison.ratio(way)
        return comparison.ratio(way, comparison[self.over]) if self.over in comparison else None


def share(comparison: Comparison, name: str) -> Spread:
    """Return the bytes that a way has to move, over its time, as a share of the yardstick's speed."""
    parameters = comparison.parameters
    return comparison.ratio(comparison[name]).over(parameters["bytes"] / parameters["limit_bytes"])


def _engines(weighting: str) -> tuple[str, ...]:
    return tuple(f"diffmtl_fast {engine}, {weighting}" for engine in ("grouped", "sliced", "lean"))


def _goals() -> Iterator[Goal]:
    step, ops, weights, clustering = (
        "full training step",
        "fused ops",
        "Nash/PCGrad weights",
        "interval clustering",
    )
    ours, squared = "diffmtl_fast", "diffmtl_fast, squared"
    five = {"k": 5}
    for weighting in ("PCGrad", "NashMTL"):
        title = f"{weighting} step / plain step"
        yield Goal(title, step, _engines(weighting), 1.15, 1.05, five, device="cpu")
        yield Goal(title, step, _engines(weighting), 1.10, 1.03, five, device="cuda")
    for way in ("UncertaintyWeighting", "DifficultyCurriculum"):
        yield Goal(f"{way} step / plain step", step, (f"diffmtl_fast, {way}",), 1.02, 1.01, five)
    one_pass = {"op": "gram", "dtype": "float32", "kind": "memory"}
    yield Goal("Gramian's bandwidth / that of reading J", ops, (ours,), 0.7, 0.9, one_pass, measure="share")
    loop = "published loop over vectors"
    yield Goal(
        "PCGrad given J / published loop", weights, (ours,), 1 / 8, 1 / 12, {"op": "PCGrad given J"}, loop
    )
    for solver in ("as published", "compiled once"):
        yield Goal(
            f"Nash weights / cvxpy + ECOS, {solver}",
            weights,
            (ours,),
            1 / 200,
            1 / 200,
            {"op": "Nash weights"},
            f"cvxpy + ECOS, {solver}",
        )
    thousand = {"T": 1000, "k": 5, "cost": "log-SNR"}
    yield Goal(
        "cluster_snr, T = 1000, the whole call", clustering, (ours,), 1e-3, 2e-4, thousand, measure="seconds"
    )
    for way, kind in ((ours, "absolute"), (squared, "squared")):
        million, most = {"T": 1_000_000, "k": 8}, {"T": 10_000_000, "k": 1000}
        yield Goal(f"{kind} cost / kmeans1d", clustering, (way,), 1 / 4, 1 / 8, million, "kmeans1d")
        yield Goal(f"{kind} cost, T = 10⁷, k = 1000", clustering, (way,), 60, 15, most, measure="seconds")
        yield Goal(f"{kind} cost, T = 10⁷, k = 1000", clustering, (way,), 2, 2, most, measure="gib")
    kernels = {"kind": "memory"}
    yield Goal(
        "GPU kernel's bandwidth / that of memory",
        ops,
        (ours,),
        0.8,
        0.9,
        kernels,
        measure="share",
        device="cuda",
    )


GOALS = tuple(_goals())


def reached(goal: Goal, results: Results) -> Iterator[tuple[str, Spread]]:
    """Yield the comparisons of a goal and what was reached in them."""
    device = str(results.settings["device"]).split(":")[0]
    for comparison in results.comparisons:
        if goal.concerns(comparison.group, comparison.parameters, device):
            found = goal.value(comparison)
            if found is not None:
                yield comparison.case, found
