"""Which of the papers' observations reproduce: by criteria that are fixed before the figures are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .._extras import require
from .plan import ANTI_CURRICULUM, CURRICULUM, VANILLA, Variant
from .results import Axis, Results
from .statistics import Differences, matrix_correlation

CONFIDENCE = 0.95
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Claim:
    """A statement of the papers and what the study says of it.

    Attributes:
        source: of the statement.
        statement: what was observed there.
        criterion: when it counts as reproduced here.
        verdict: the outcome.
        evidence: the figures behind it.
    """

    source: str
    statement: str
    criterion: str
    verdict: str
    evidence: str


def claims(results: Results, log_snr: np.ndarray) -> list[Claim]:
    """Judge every observation by the results.

    Args:
        results: of a study.
        log_snr: [T] of its noise schedule.
    """
    return [
        _affinity(results, "timestep", np.arange(len(log_snr), dtype=np.float64)),
        _affinity(results, "log-SNR", log_snr),
        _transfer(results),
        *_comparisons(results, "clusters", "ANT", "clustering with UW, PCGrad or NashMTL"),
        _difficulty(results),
        *_comparisons(results, "curriculum", "curriculum", "the curriculum (easy → hard)"),
        _order(results),
    ]


def middles(results: Results) -> np.ndarray:
    """The middle timestep of every task of the affinities, int64 [tasks]."""
    from ..clustering import cluster_timesteps

    assert results.affinity is not None
    edges = cluster_timesteps(len(results.affinity), results.plan.tasks).boundaries
    return (edges[:-1] + edges[1:]) // 2


def _affinity(results: Results, name: str, places: np.ndarray) -> Claim:
    statement = f"O1: the affinity of two tasks falls as their distance in {name} grows"
    criterion = (
        "Spearman's ρ of affinity and distance below 0, p ≤ 0.05 when tasks are permuted (Mantel test)"
    )
    if results.affinity is None:
        return Claim("ANT", statement, criterion, UNKNOWN, "")
    index = middles(results)
    distance = np.abs(np.subtract.outer(places[index], places[index]))
    rho, p = matrix_correlation(results.affinity[np.ix_(index, index)], distance)
    if p <= 0.05 and rho < 0:
        verdict = "reproduced"
    else:
        verdict = "contradicted" if rho > 0 and p >= 0.95 else "not shown"
    return Claim("ANT", statement, criterion, verdict, f"ρ = {rho:.2f}, p = {p:.3f}, {len(index)} tasks")


def _transfer(results: Results) -> Claim:
    statement = "O2: learning all tasks at once harms some of them (negative transfer)"
    criterion = (
        "for some interval an expert lowers the Fréchet distance: its interval of the mean log ratio, "
        f"{CONFIDENCE:.0%} over all intervals together, lies below 0"
    )
    found = results.transfer()
    if found is None:
        return Claim("ANT", statement, criterion, UNKNOWN, "")
    edges = next(iter(results.gaps.values()))["boundaries"]
    names = [f"{first}–{end - 1}" for first, end in pairwise(edges)]
    below, above = _outside(found, names)
    verdict = "reproduced" if below else "contradicted" if above else "not shown"
    evidence = f"experts better in {_listed(below)}; worse in {_listed(above)}; of {len(names)} intervals"
    return Claim("ANT", statement, criterion, verdict, evidence)


def _comparisons(results: Results, family: str, source: str, subject: str) -> list[Claim]:
    variants = [variant for variant in results.cases() if _claimed(variant, family)]
    place: dict[Axis, str] = {"steps": "equal steps", "calibrated": "equal training time (calibrated)"}
    return [
        _comparison(results, variants, source, subject, axis, words, quality)
        for quality in (True, False)
        for axis, words in place.items()
    ]


def _claimed(variant: Variant, family: str) -> bool:
    return variant.family == family and variant != ANTI_CURRICULUM


def _comparison(
    results: Results,
    variants: list[Variant],
    source: str,
    subject: str,
    axis: Axis,
    words: str,
    quality: bool,
) -> Claim:
    if quality:
        statement = (
            f"Better quality: {subject} reaches a lower Fréchet distance than plain training at {words}"
        )
        measured = "Fréchet distance"
    else:
        unit = "steps" if axis == "steps" else "training time (calibrated)"
        statement = f"Faster convergence: {subject} reaches plain training's last quality in less {unit}"
        measured = f"{unit} to that quality"
        statement = statement.replace("less steps", "fewer steps")
    criterion = (
        f"mean log ratio of the {measured} to plain training of the same seed below 0 for every variant, by "
        f"intervals that hold together at {CONFIDENCE:.0%}; in part: for some, and above 0 for none"
    )
    pairs = [(variant, VANILLA) for variant in _others(results)]
    if not variants or not results.seeds(VANILLA):
        return Claim(source, statement, criterion, UNKNOWN, "")
    compare = results.quality if quality else results.time_to_quality
    found = compare(axis, pairs)
    names = [one.title for one, _ in pairs]
    of_family = {variant.title for variant in variants}
    below, above = ([name for name in names if name in of_family] for names in _outside(found, names))
    verdict = _verdict(len(below), len(above), len(variants))
    evidence = f"{_listed(below)} better; {_listed(above)} worse; of {len(variants)}"
    return Claim(source, statement, criterion, verdict, evidence)


def _order(results: Results) -> Claim:
    statement = "The order matters: easy → hard ends at a lower Fréchet distance than hard → easy"
    criterion = (
        "mean log ratio of the two at equal steps below 0, by the noise and the intervals of all comparisons"
    )
    pairs = [*((variant, VANILLA) for variant in _others(results)), (CURRICULUM, ANTI_CURRICULUM)]
    if not (results.seeds(CURRICULUM) and results.seeds(ANTI_CURRICULUM) and results.seeds(VANILLA)):
        return Claim("curriculum", statement, criterion, UNKNOWN, "")
    found = results.quality("steps", pairs)
    verdict = _verdict(int(found.high[-1] < 0), int(found.low[-1] > 0), 1)
    return Claim("curriculum", statement, criterion, verdict, f"ratio {ratio(found, -1)}")


def _difficulty(results: Results) -> Claim:
    statement = "Low-noise intervals converge more slowly"
    criterion = (
        "Spearman's ρ of an interval's place (0: least noise) and its expert's steps to 90 % of the fall of its "
        "loss below 0, one-sided p ≤ 0.05, all seeds together"
    )
    points = [
        (place, steps)
        for found in results.difficulty.values()
        for place, steps in enumerate(found["steps_to_fraction"])
        if steps is not None
    ]
    if len(points) < 3:
        return Claim("curriculum", statement, criterion, UNKNOWN, "")
    place, steps = zip(*points, strict=True)
    found = require("scipy.stats", "train").spearmanr(place, steps, alternative="less")
    rho, p = float(found.statistic), float(found.pvalue)
    verdict = "reproduced" if p <= 0.05 else "contradicted" if p >= 0.95 else "not shown"
    return Claim("curriculum", statement, criterion, verdict, f"ρ = {rho:.2f}, p = {p:.3f}")


def ratio(found: Differences, index: int) -> str:
    """A mean log ratio and its interval as factors."""
    mean, low, high = (np.exp(values[index]) for values in (found.mean, found.low, found.high))
    if not np.isfinite(high):
        return f"{mean:.2f} (no interval: one seed)"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _others(results: Results) -> list[Variant]:
    return [variant for variant in results.cases() if variant != VANILLA]


def _outside(found: Differences, names: Sequence[str]) -> tuple[list[str], list[str]]:
    below = [name for name, high in zip(names, found.high, strict=True) if high < 0]
    above = [name for name, low in zip(names, found.low, strict=True) if low > 0]
    return below, above


def _verdict(better: int, worse: int, number: int) -> str:
    if better == number:
        return "reproduced"
    if better:
        return "mixed" if worse else "reproduced in part"
    return "contradicted" if worse else "not shown"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
