"""What a study has measured so far, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..train import history
from .calibration import Cost, costs
from .folder import StudyFolder
from .plan import ANTI_CURRICULUM, CURRICULUM, VANILLA, Plan, Variant
from .statistics import Differences, blocked_differences, relative_differences

Array: TypeAlias = "NDArray[np.float64]"
#: What training is counted in: its steps, its steps times their cost in plain steps, its seconds.
Axis: TypeAlias = Literal["steps", "calibrated", "measured"]
AXES: tuple[Axis, ...] = ("steps", "calibrated", "measured")
METRICS = ("frechet_distance", "precision", "recall", "class_agreement")


@dataclass(frozen=True)
class Curve:
    """The metrics of a run at its checkpoints.

    Attributes:
        position: how far training was at each of the E evaluations, float64 [E] by axis.
        figures: what was measured there, float64 [E] by metric.
        conflicts: mean share of conflicting pairs of clusters, where it was measured.
        phases: the first iteration in the log of each phase of a curriculum.
    """

    position: dict[Axis, Array]
    figures: dict[str, Array]
    conflicts: float | None
    phases: dict[int, int]

    def at(self, axis: Axis, place: float) -> float:
        """The Fréchet distance at a position between evaluations, interpolated on logarithmic axes."""
        position, distance = np.log(self.position[axis]), np.log(self.figures["frechet_distance"])
        return float(np.exp(np.interp(np.log(place), position, distance)))

    def reaches(self, axis: Axis, level: float) -> float:
        """Where the Fréchet distance first falls to a level, interpolated as in `at`; infinity if nowhere."""
        position, distance = np.log(self.position[axis]), np.log(self.figures["frechet_distance"])
        below = np.flatnonzero(distance <= np.log(level))
        if not below.size:
            return float("inf")
        j = int(below[0])
        if j == 0:
            return float(self.position[axis][0])
        part = (distance[j - 1] - np.log(level)) / (distance[j - 1] - distance[j])
        return float(np.exp(position[j - 1] + part * (position[j] - position[j - 1])))


@dataclass(frozen=True)
class Results:
    """The results of a study.

    Attributes:
        plan: what was to be done.
        costs: of a step, by kind of variant.
        curves: of the runs that are complete, by name of the variant and seed.
        gaps: of negative transfer, by seed: the content of negative-transfer.json.
        early_gaps: the same for experts at the iterations that bracket equal exposure, by seed and iteration.
        difficulty: by seed: the content of difficulty.json.
        disattenuated: task affinities [T, T] corrected for the noise of the images, NaN where a gradient is
            nothing but noise; None if they were not measured.
        machine: that of the calibration.
    """

    plan: Plan
    costs: dict[str, Cost]
    curves: dict[tuple[str, int], Curve]
    gaps: dict[int, dict[str, Any]]
    early_gaps: dict[int, dict[int, dict[str, Any]]]
    difficulty: dict[int, dict[str, Any]]
    disattenuated: Array | None
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The figures as nested dictionaries of JSON's types; of the affinities there is a file of their own."""
        runs = {
            f"{name}-seed-{seed}": {
                **{axis: curve.position[axis].tolist() for axis in AXES},
                **{metric: values.tolist() for metric, values in curve.figures.items()},
                "conflicts": curve.conflicts,
                "phases": curve.phases,
            }
            for (name, seed), curve in self.curves.items()
        }
        return {
            "plan": self.plan.to_dict(),
            "costs": {kind: asdict(cost) for kind, cost in self.costs.items()},
            "machine": self.machine,
            "runs": runs,
            "gaps": self.gaps,
            "early_gaps": self.early_gaps,
            "steps_to_fraction": {
                seed: found["steps_to_fraction"] for seed, found in self.difficulty.items()
            },
        }

    def cases(self) -> list[Variant]:
        """The variants with at least one complete run, plain training first."""
        return [variant for variant in self.plan.variants if self.seeds(variant)]

    def seeds(self, variant: Variant) -> list[int]:
        """The seeds with which a variant is complete."""
        return [seed for seed in range(self.plan.seeds) if (variant.name, seed) in self.curves]

    def figures(self, variant: Variant, metric: str) -> Array:
        """The metric at the end of training, float64 [seeds]."""
        return np.array([self.curves[variant.name, seed].figures[metric][-1] for seed in self.seeds(variant)])

    def budget(self, axis: Axis, seed: int) -> float:
        """The last position that all complete runs of a seed reach, at which they can be compared."""
        ends = [curve.position[axis][-1] for (_, of_seed), curve in self.curves.items() if of_seed == seed]
        return float(min(ends))

    def pairs(self) -> list[tuple[Variant, Variant]]:
        """What is compared: every variant with plain training, then the two orders of the curriculum."""
        found = [(variant, VANILLA) for variant in self.cases() if variant != VANILLA]
        orders = (CURRICULUM, ANTI_CURRICULUM)
        return [*found, orders] if set(orders) <= set(self.cases()) else found

    def at_budget(self, variant: Variant, axis: Axis) -> Array:
        """The Fréchet distance at the seed's budget, float64 [seeds]."""
        return np.array(
            [
                self.curves[variant.name, seed].at(axis, self.budget(axis, seed))
                for seed in self.seeds(variant)
            ]
        )

    def quality(self, axis: Axis) -> Differences:
        """Differences of the logarithm of the Fréchet distance at an equal budget, for `pairs`."""
        cases = self.cases()
        values = np.full((len(cases), self.plan.seeds), np.nan)
        for row, variant in zip(values, cases, strict=True):
            row[self.seeds(variant)] = np.log(self.at_budget(variant, axis))
        pairs = [(cases.index(one), cases.index(other)) for one, other in self.pairs()]
        return blocked_differences(values, pairs)

    def time_to_quality(self, axis: Axis) -> Differences:
        """Differences of the logarithm of the time to equal quality, for the pairs with plain training.

        Equal quality is the higher (worse) of the two runs' last Fréchet distances, which both of them reach.
        Exchanging the two runs changes the sign alone.
        """
        others = [variant for variant in self.cases() if variant != VANILLA]
        values = np.full((len(others), self.plan.seeds), np.nan)
        for row, variant in zip(values, others, strict=True):
            for seed in set(self.seeds(variant)) & set(self.seeds(VANILLA)):
                row[seed] = self._log_time_ratio(axis, variant, seed)
        return relative_differences(values)

    def promising(self, count: int) -> list[Variant]:
        """The methods that are not the papers' with the fewest steps to equal quality, in the first seed alone.

        Ties, such as of methods that never reach it, are decided by the Fréchet distance at the end. A method that
        diverged has no figures and is left out.
        """
        others = [
            variant for variant in self.cases() if variant.family == "others" and 0 in self.seeds(variant)
        ]

        def order(variant: Variant) -> tuple[float, float]:
            last = float(self.curves[variant.name, 0].figures["frechet_distance"][-1])
            return self._log_time_ratio("steps", variant, 0), last

        return sorted(others, key=order)[:count]

    def _log_time_ratio(self, axis: Axis, variant: Variant, seed: int) -> float:
        one, plain = self.curves[variant.name, seed], self.curves[VANILLA.name, seed]
        level = max(float(curve.figures["frechet_distance"][-1]) for curve in (one, plain))
        return float(np.log(one.reaches(axis, level) / plain.reaches(axis, level)))

    def reached(self, variant: Variant, axis: Axis, share: float) -> list[float]:
        """By seed, where plain training's Fréchet distance at a share of its iterations is reached."""
        found = []
        for seed in self.seeds(variant):
            if (VANILLA.name, seed) in self.curves:
                plain = self.curves[VANILLA.name, seed]
                level = plain.at("steps", share * self.plan.iterations)
                found.append(self.curves[variant.name, seed].reaches(axis, level))
        return found

    def transfer(self, iteration: float | None = None) -> Differences | None:
        """Differences of the logarithm of the Fréchet distance with an expert and without, for every interval.

        Args:
            iteration: see `transfer_ratios`.
        """
        ratios = self.transfer_ratios(iteration)
        return None if ratios is None else relative_differences(ratios)

    def transfer_ratios(self, iteration: float | None = None) -> Array | None:
        """Logarithms of the Fréchet distance with an expert over that without, float64 [intervals, seeds].

        Args:
            iteration: of the experts, their last by default. Logarithms are interpolated in that of the iteration.
        """
        if iteration is None:
            ratios = [_log_ratios(gap) for gap in self.gaps.values()]
        else:
            ratios = [_interpolated(found, iteration) for found in self.early_gaps.values()]
        return np.stack(ratios, axis=1) if ratios else None


def load_results(study: StudyFolder) -> Results:
    """Read what is complete of a study.

    Raises:
        UserError: there is no study.
    """
    plan = Plan.read(study.plan)
    calibration = _json(study.calibration) if study.calibration.exists() else {"seconds": {}, "machine": {}}
    found = costs(calibration)
    curves = {
        (variant.name, seed): _curve(study, variant, seed, found)
        for variant in plan.variants
        for seed in range(plan.seeds)
        if study.evaluations(variant, seed).exists()
    }
    seeds = [seed for seed in range(plan.seeds) if study.gaps(seed).exists()]
    gaps = {seed: _json(study.gaps(seed)) for seed in seeds}
    early_gaps = {
        seed: {iteration: _json(study.gaps(seed, iteration)) for iteration in plan.exposures}
        for seed in seeds
        if plan.exposures and all(study.gaps(seed, iteration).exists() for iteration in plan.exposures)
    }
    difficulty = {seed: _json(study.gaps(seed).with_name("difficulty.json")) for seed in seeds}
    disattenuated = np.load(study.disattenuated) if study.disattenuated.exists() else None
    return Results(plan, found, curves, gaps, early_gaps, difficulty, disattenuated, calibration["machine"])


def _log_ratios(gap: dict[str, Any]) -> Array:
    return np.log(np.array(gap["switched_frechet_distance"]) / gap["frechet_distance"])


def _interpolated(found: dict[int, dict[str, Any]], iteration: float) -> Array:
    """The log ratios of every interval between the iterations that they were measured at."""
    places = np.log(list(found))
    measured = np.stack([_log_ratios(gap) for gap in found.values()], axis=1)
    return np.array([np.interp(np.log(iteration), places, values) for values in measured])


def _curve(study: StudyFolder, variant: Variant, seed: int, found: dict[str, Cost]) -> Curve:
    rows = _json(study.evaluations(variant, seed))
    steps = np.array([row["iteration"] for row in rows], dtype=np.float64)
    ratio = found[variant.kind].ratio if found else 1.0
    position: dict[Axis, Array] = {
        "steps": steps,
        "calibrated": steps * ratio,
        "measured": np.array([row["seconds"] for row in rows]),
    }
    lines = history.read(study.run(variant, seed).log)
    shares = [line["conflicts"] for line in lines if line.get("conflicts") is not None]
    phases: dict[int, int] = {}
    for line in lines:
        if "phase" in line:
            phases.setdefault(line["phase"], line["iteration"])
    return Curve(
        position,
        {metric: np.array([row[metric] for row in rows]) for metric in METRICS},
        float(np.mean(shares)) if shares else None,
        phases,
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text())
