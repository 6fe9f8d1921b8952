"""What the library set out to reach: ratios to other ways, a few times, and one size of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.models import TITLES
from benchmarks.names import (
    COMPILED_ONCE,
    COMPILED_PCGRAD,
    COMPILED_PLAIN,
    CURRICULUM,
    DIGITS_DIT,
    GRAM,
    GRAMIAN_WEIGHTS,
    KMEANS1D,
    LOOP,
    MANY_K,
    NASH_WEIGHTS,
    OURS,
    PARALLEL_PCGRAD,
    PCGRAD_GIVEN_J,
    POINTS,
    REBUILT,
    REPLICATED_PCGRAD,
    SCALED,
    SQUARED,
    STUDY_UNET,
    TORCHJD,
    TYPICAL_K,
    UNCERTAINTY,
    Group,
    engine_step,
)

from .results import Comparison, Machine, Spread
from .text import duration, figure, fraction

Measure = Literal["ratio", "share", "seconds", "gib"]
Verdict = Literal["met", "short", "within noise of the bar"]


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        title: what it is.
        group: of its comparisons.
        where: parameters that a comparison must have.
        ways: ours, of which the best counts.
        bar: what has to be reached.
        stretch: what would be better still, a number or in words.
        over: the way that a ratio is formed with, the yardstick if not given.
        measure: a ratio of times, a share of the limit's speed, seconds, or GiB at the peak.
        device: "cpu" or "cuda" if it is for one alone.
    """

    title: str
    group: Group
    ways: tuple[str, ...]
    bar: float
    stretch: float | str
    where: Mapping[str, Any] = field(default_factory=dict)
    over: str | None = None
    measure: Measure = "ratio"
    device: str | None = None

    def verdict(self, comparison: Comparison, value: Spread) -> Verdict:
        """Return whether the bar is reached.

        It is missed if both quantiles are beyond it, whatever the noise, and met if what was reached differs from
        it on its good side: see `Comparison.differs`.
        """
        missed = value.high < self.bar if self.measure == "share" else value.low > self.bar
        if missed:
            return "short"
        timed = self.measure != "gib"  # noise is known of times alone
        return "met" if not timed or comparison.differs(value / self.bar) else "within noise of the bar"

    @property
    def bar_text(self) -> str:
        """The bar as it is read."""
        return self._limit(self.bar)

    @property
    def stretch_text(self) -> str:
        """The stretch as it is read."""
        return self.stretch if isinstance(self.stretch, str) else self._limit(self.stretch)

    def _limit(self, value: float) -> str:
        return f"{'≥' if self.measure == 'share' else '≤'} {self._text(value, 3, short=True)}"

    def text(self, value: float, digits: int | None = None) -> str:
        """Format what was reached, by default with as many digits as let it read differently from the bar."""
        return self._text(value, self.digits(value) if digits is None else digits)

    def digits(self, value: float) -> int:
        """Return how many digits let a value read differently from the bar, at least three."""
        apart = (n for n in range(3, 7) if self._text(value, n) != self._text(self.bar, n))
        return next(apart, 3)

    def _text(self, value: float, digits: int, short: bool = False) -> str:
        if self.measure == "seconds":
            return duration(value, digits)
        if self.measure == "ratio" and self.bar < 0.5:
            return fraction(value, digits)
        number = f"{value:g}" if short else figure(value, digits)
        return f"{number} GiB" if self.measure == "gib" else number

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


def bandwidths(comparison: Comparison, name: str) -> str:
    """Format the median GB/s of a way and of the yardstick: "20 of 30". `share` forms the ratio round by round."""
    parameters, way = comparison.parameters, comparison[name]
    own, limit = way.time.median, comparison.yardstick.time.median
    return f"{1e-9 * parameters['bytes'] / own:.3g} of {1e-9 * parameters['limit_bytes'] / limit:.3g}"


def _engines(weighting: str) -> tuple[str, ...]:
    return tuple(engine_step(engine, weighting) for engine in ("grouped", "sliced", "lean"))


# Of the compiled step, by model and K: the bar and the stretch.
_COMPILED_BARS = {
    "dit": {5: (1.10, 1.06), 20: (1.15, 1.10)},
    "diffusers-dit": {5: (1.12, 1.06), 20: (1.18, 1.10)},
    "unet": {5: (1.18, 1.10), 20: (1.35, 1.20)},
    "small-unet": {5: (1.4, 1.2)},
}


def _goals() -> Iterator[Goal]:
    step, ops, weights, clustering = Group.STEP, Group.OPS, Group.WEIGHTS, Group.CLUSTERING
    five = {"k": TYPICAL_K}
    for weighting in ("PCGrad", "NashMTL"):
        title = f"{weighting} step / plain step"
        yield Goal(title, step, _engines(weighting), 1.15, 1.05, five, device="cpu")
        yield Goal(title, step, _engines(weighting), 1.10, 1.03, five, device="cuda")
    for model, bar, stretch in (("dit", 1.15, 1.10), ("unet", 1.30, 1.20)):
        title = f"{TITLES[model]}, K = {MANY_K}: PCGrad step / plain step"
        many = {"k": MANY_K, "model": model, "batch": 40}
        yield Goal(title, step, (engine_step("grouped", "PCGrad"),), bar, stretch, many, device="cpu")
    for title, way in (("UncertaintyWeighting", UNCERTAINTY), ("DifficultyCurriculum", CURRICULUM)):
        yield Goal(f"{title} step / plain step", step, (way,), 1.02, 1.01, five)
    for model, bars in _COMPILED_BARS.items():
        for k, (bar, stretch) in bars.items():
            yield Goal(
                f"{TITLES[model]}, K = {k}: PCGrad step / plain step, both compiled",
                Group.COMPILED,
                (COMPILED_PCGRAD,),
                bar,
                stretch,
                {"k": k, "model": model},
                COMPILED_PLAIN,
                device="cpu",
            )
    one_pass = {"op": GRAM, "dtype": "float32", "kind": "memory"}
    yield Goal("Gramian's bandwidth / that of reading J", ops, (OURS,), 0.7, 0.9, one_pass, measure="share")
    yield Goal(
        "PCGrad given J / published loop", weights, (OURS,), 1 / 8, 1 / 12, {"op": PCGRAD_GIVEN_J}, LOOP
    )
    for solver in (REBUILT, COMPILED_ONCE):
        yield Goal(
            f"Nash weights / {solver}",
            weights,
            (OURS,),
            1 / 200,
            "on device, no host sync",
            {"op": NASH_WEIGHTS},
            solver,
        )
    yield Goal(
        "weights from the Gramian / TorchJD",
        weights,
        (OURS,),
        1 / 10,
        1 / 20,
        {"op": GRAMIAN_WEIGHTS},
        TORCHJD,
    )
    thousand = {"T": 1000, "k": 5, "cost": "log-SNR"}
    yield Goal(
        "cluster_snr, T = 1000, the whole call", clustering, (OURS,), 1e-3, 2e-4, thousand, measure="seconds"
    )
    for way, kind in ((OURS, "absolute"), (SQUARED, "squared")):
        million, most = {"T": 1_000_000, "k": 8}, {"T": 10_000_000, "k": 1000}
        yield Goal(f"{kind} cost / kmeans1d", clustering, (way,), 1 / 4, 1 / 8, million, KMEANS1D)
        yield Goal(f"{kind} cost, T = 10⁷, k = 1000", clustering, (way,), 60, 15, most, measure="seconds")
        yield Goal(f"{kind} cost, T = 10⁷, k = 1000", clustering, (way,), 2, 2, most, measure="gib")
    two = {"title": "DiT"}
    yield Goal(
        "cluster-parallel PCGrad / DDP step",
        Group.DISTRIBUTED,
        (PARALLEL_PCGRAD,),
        1.15,
        1.05,
        two | {"k": 2},  # one cluster in each process
        device="cpu",
    )
    yield Goal(
        "replicated PCGrad / DDP step", Group.DISTRIBUTED, (REPLICATED_PCGRAD,), 1.6, 1.3, two, device="cpu"
    )
    yield Goal(
        "cosines of all pairs of 1,000 given gradients / published loop, scaled",
        Group.AFFINITY,
        (OURS,),
        1 / 100,
        1 / 200,
        {"T": 1000, "given": "gradients"},
        SCALED,
    )
    for model in (POINTS, STUDY_UNET, DIGITS_DIT):
        yield Goal(
            f"task affinity of {model} / published loops, scaled",
            Group.AFFINITY,
            (OURS,),
            1 / 100,
            1 / 200,
            {"T": 1000, "model": model},
            SCALED,
        )
    kernels = {"kind": "memory"}
    yield Goal(
        "GPU kernel's bandwidth / that of memory",
        ops,
        (OURS,),
        0.8,
        0.9,
        kernels,
        measure="share",
        device="cuda",
    )


GOALS = tuple(_goals())


def reached(goal: Goal, machine: Machine) -> Iterator[tuple[Comparison, Spread | None]]:
    """Yield the comparisons of a goal and what was reached in them: None if a way had no figures."""
    for comparison in machine.comparisons:
        if goal.concerns(comparison.group, comparison.parameters, machine.device):
            yield comparison, goal.value(comparison)


def table(machine: Machine) -> str:
    """Format what was to be reached on a machine, and what was."""
    lines = [
        f"| {machine.title} | case | bar | stretch | reached | 20 to 80 % | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    missing = []
    for goal in GOALS:
        if goal.device not in (None, machine.device):
            continue
        rows = [_row(goal, comparison, value) for comparison, value in reached(goal, machine)]
        lines += rows
        missing += [] if rows else [goal]
    found = "\n".join(lines) if len(lines) > 2 else "No goal was measured."
    return f"{found}\n\nNot measured: {_names(missing)}." if missing else found


def _row(goal: Goal, comparison: Comparison, value: Spread | None) -> str:
    head = f"| {goal.title} | {comparison.case} | {goal.bar_text} | {goal.stretch_text} |"
    if value is None:
        needed = [name for name in (*goal.ways, goal.over) if name in comparison.left_out]
        reasons = "; ".join(f"{name}: {comparison.left_out[name]}" for name in needed if name)
        return f"{head} – | – | not measured{': ' if reasons else ''}{reasons} |"
    low, high = sorted((value.low, value.high))
    digits = goal.digits(value.median)
    interval = f"{goal.text(low, digits)} to {goal.text(high, digits)}"
    return f"{head} {goal.text(value.median)} | {interval} | {goal.verdict(comparison, value)} |"


def elsewhere(machines: Sequence[Machine]) -> str:
    """Name the goals of a device that none of the machines is; nothing if there are none."""
    found = {machine.device for machine in machines}
    absent = [goal for goal in GOALS if goal.device not in (None, *found)]
    devices = {"cpu": "CPU", "cuda": "GPU"}
    return "\n".join(
        f"Not measured, for want of a {name}: {_names([g for g in absent if g.device == device])}."
        for device, name in devices.items()
        if any(goal.device == device for goal in absent)
    )


def _names(goals: Sequence[Goal]) -> str:
    return "; ".join(f"{goal.title} {goal.bar_text}" for goal in goals)
