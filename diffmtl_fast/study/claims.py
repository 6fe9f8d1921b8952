"""Which of the papers' observations reproduce: by criteria that are fixed before the figures are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .._extras import require
from .plan import ANTI_CURRICULUM, CURRICULUM, STUDIED, VANILLA, Variant, listed
from .results import Axis, Results
from .statistics import Differences, matrix_correlation

CONFIDENCE = 0.95
UNKNOWN = "not measured"
#: What the words of a verdict mean.
VERDICTS = {
    "reproduced": "all methods of the statement are better",
    "reproduced in part": "some are better, none is worse, the rest is undecided",
    "mixed": "some are better and some are worse",
    "worse in part": "some are worse, none is better, the rest is undecided",
    "contradicted": "all are worse",
    "not shown": "all are undecided: no difference exceeds the noise, which does not say that there is none",
    UNKNOWN: "the study has no figures for it yet",
}


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
        *_comparisons(results, "clusters", "ANT", f"clustering with {listed(STUDIED, 'or')}"),
        _difficulty(results),
        *_comparisons(results, "curriculum", "curriculum", "the curriculum (easy → hard)"),
        _order(results),
    ]


def _middles(number: int, tasks: int) -> np.ndarray:
    """The middle timestep of every task of the affinities, int64 [tasks]."""
    from ..clustering import cluster_timesteps

    edges = cluster_timesteps(number, tasks).boundaries
    return (edges[:-1] + edges[1:]) // 2


def _affinity(results: Results, name: str, places: np.ndarray) -> Claim:
    statement = f"O1: the affinity of two tasks falls as their distance in {name} grows"
    criterion = (
        "Spearman's ρ of affinity, corrected for attenuation by the noise of the images, and distance below 0, "
        "p ≤ 0.05 when tasks are permuted (Mantel test)"
    )
    if results.disattenuated is None:
        return Claim("ANT", statement, criterion, UNKNOWN, "")
    index = _middles(len(places), results.plan.tasks)
    affinity = results.disattenuated[np.ix_(index, index)]
    known = np.isfinite(affinity).sum(1) > 1  # without a reliability a task has its diagonal alone
    evidence = f"{known.sum()} tasks, one run (seed 0)"
    if not known.all():
        evidence += f"; {np.sum(~known)} more left out, whose gradients are nothing but noise"
    if known.sum() < 3:
        return Claim("ANT", statement, criterion, UNKNOWN, evidence)
    affinity, place = affinity[np.ix_(known, known)], places[index[known]]
    rho, p = matrix_correlation(affinity, np.abs(np.subtract.outer(place, place)))
    if p <= 0.05 and rho < 0:
        verdict = "reproduced"
    else:
        verdict = "contradicted" if rho > 0 and p >= 0.95 else "not shown"
    return Claim("ANT", statement, criterion, verdict, f"ρ = {rho:.2f}, {_p_value(p)}, {evidence}")


def _transfer(results: Results) -> Claim:
    statement = "O2: learning all tasks at once harms some of them (negative transfer)"
    criterion = (
        "for some interval an expert lowers the Fréchet distance at equal exposure, that is when it has seen its "
        "timesteps as often as plain training has: its interval of the mean log ratio, "
        f"{CONFIDENCE:.0%} over all intervals together, lies below 0, as does every seed's. Contradicted: all "
        "experts are worse even at equal iterations, which give them more training on every timestep"
    )
    found, exposed = results.transfer(), results.transfer(results.plan.equal_exposure)
    if found is None:
        return Claim("ANT", statement, criterion, UNKNOWN, "")
    edges = next(iter(results.gaps.values()))["boundaries"]
    names = [f"{first}–{end - 1}" for first, end in pairwise(edges)]
    sides = {
        place: _outside(differences, names)
        for place, differences in (("exposure", exposed), ("iterations", found))
        if differences is not None
    }
    if exposed is None:
        verdict = UNKNOWN
    elif sides["exposure"][0]:
        verdict = "reproduced"
    else:
        verdict = "contradicted" if len(sides["iterations"][1]) == len(names) else "not shown"
    evidence = "; ".join(
        f"equal {place}: experts better in {_listed(below)}, worse in {_listed(above)}"
        for place, (below, above) in sides.items()
    )
    return Claim("ANT", statement, criterion, verdict, f"{evidence}; of {len(names)} intervals")


def _comparisons(results: Results, family: str, source: str, subject: str) -> list[Claim]:
    variants = [variant for variant in results.cases() if _claimed(variant, family)]
    axes: tuple[Axis, ...] = ("steps", "calibrated")
    return [
        _comparison(results, variants, source, subject, axis, quality)
        for quality in (True, False)
        for axis in axes
    ]


def _claimed(variant: Variant, family: str) -> bool:
    return variant.family == family and variant != ANTI_CURRICULUM


def _comparison(
    results: Results, variants: list[Variant], source: str, subject: str, axis: Axis, quality: bool
) -> Claim:
    if quality:
        place = {"steps": "equal steps", "calibrated": "equal training time (calibrated)"}[axis]
        statement = (
            f"Better quality: {subject} reaches a lower Fréchet distance than plain training at {place}"
        )
        criterion = "by the ratio of the Fréchet distance to that of plain training with the same seed"
    else:
        amount = {"steps": "fewer steps", "calibrated": "less training time (calibrated)"}[axis]
        statement = f"Faster convergence: {subject} reaches equal quality in {amount} than plain training"
        criterion = (
            "by the ratio of the steps or the time to those of plain training with the same seed, until the "
            "poorer of the last Fréchet distances of the two"
        )
    if not variants or not results.seeds(VANILLA):
        return Claim(source, statement, criterion, UNKNOWN, "")
    found = results.quality(axis) if quality else results.time_to_quality(axis)
    plain = [one for one, other in results.pairs() if other == VANILLA]
    below, above = (
        [one.title for one, decided in zip(plain, side, strict=False) if decided and one in variants]
        for side in (found.below, found.above)
    )
    verdict = _verdict(len(below), len(above), len(variants))
    words = ("better", "worse") if quality else ("faster", "slower")
    evidence = _evidence(below, above, len(variants), words)
    return Claim(source, statement, criterion, verdict, evidence)


def _order(results: Results) -> Claim:
    statement = "The order matters: easy → hard ends at a lower Fréchet distance than hard → easy"
    criterion = "by the ratio of the two at equal steps"
    pair = (CURRICULUM, ANTI_CURRICULUM)
    if pair not in results.pairs() or not results.seeds(VANILLA):
        return Claim("curriculum", statement, criterion, UNKNOWN, "")
    found, index = results.quality("steps"), results.pairs().index(pair)
    verdict = _verdict(int(found.below[index]), int(found.above[index]), 1)
    return Claim("curriculum", statement, criterion, verdict, f"ratio {ratio(found, index)}")


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
    if len(set(steps)) == 1:
        return Claim("curriculum", statement, criterion, "not shown", "all experts took equally many steps")
    found = require("scipy.stats", "train").spearmanr(place, steps, alternative="less")
    rho, p = float(found.statistic), float(found.pvalue)
    verdict = "reproduced" if p <= 0.05 else "contradicted" if p >= 0.95 else "not shown"
    return Claim("curriculum", statement, criterion, verdict, f"ρ = {rho:.2f}, {_p_value(p)}")


def ratio(found: Differences, index: int) -> str:
    """A mean log ratio and its interval, where there is one, as factors."""
    mean, low, high = (np.exp(values[index]) for values in (found.mean, found.low, found.high))
    if not np.isfinite(mean):
        return "–"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})" if np.isfinite(high) else f"{mean:.2f}"


def _outside(found: Differences, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The cases that are decided to be below and above."""
    below, above = (
        [name for name, decided in zip(names, side, strict=True) if decided]
        for side in (found.below, found.above)
    )
    return below, above


def _verdict(better: int, worse: int, number: int) -> str:
    """See `VERDICTS`."""
    if better == number:
        return "reproduced"
    if worse == number:
        return "contradicted"
    if better:
        return "mixed" if worse else "reproduced in part"
    return "worse in part" if worse else "not shown"


def _evidence(below: list[str], above: list[str], number: int, words: tuple[str, str]) -> str:
    parts = [f"{word}: {_listed(names)}" for word, names in zip(words, (below, above), strict=True)]
    return "; ".join([*parts, f"undecided: {number - len(below) - len(above)} of {number}"])


def _listed(names: Sequence[str]) -> str:
    # The names of variants hold a comma themselves.
    return ", ".join(name.replace(", ", " on ") for name in names) if names else "none"


def _p_value(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.0005 else "p < 0.001"
