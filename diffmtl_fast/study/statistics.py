"""How far differences between runs go beyond the noise between seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._extras import require

Array: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True)
class Differences:
    """Mean differences of several cases with intervals that hold for all of them at once.

    Attributes:
        mean: float64 [V], over the seeds; NaN for a case without any.
        low: float64 [V], lower end of the interval.
        high: float64 [V], upper end.
        sd: standard deviation between seeds, pooled over the cases; NaN with one seed.
        freedom: its degrees of freedom.
    """

    mean: Array
    low: Array
    high: Array
    sd: float
    freedom: int


def paired_differences(values: Array, confidence: float = 0.95) -> Differences:
    """Confidence intervals of mean paired differences, simultaneous over the cases.

    With a few seeds a case of its own says little about the noise, so that the standard deviation is pooled over
    the cases, which takes them to be as noisy as each other. Student's t, and Bonferroni's correction for the
    number of cases.

    Args:
        values: [V, S] differences of V cases and S seeds, NaN where there is none.
        confidence: that all intervals hold.

    Returns:
        Means and intervals; with a single seed the intervals are infinite.
    """
    values = np.asarray(values, dtype=np.float64)
    counts = np.isfinite(values).sum(1)
    sums = np.where(np.isfinite(values), values, 0.0).sum(1)
    mean = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    freedom = int(np.maximum(counts - 1, 0).sum())
    if freedom == 0:
        wide = np.full_like(mean, np.inf)
        return Differences(mean, -wide, wide, float("nan"), 0)
    sd = float(np.sqrt(np.nansum(np.square(values - mean[:, None])) / freedom))
    tail = (1.0 - confidence) / 2 / max(int((counts > 0).sum()), 1)
    quantile = float(require("scipy.stats", "train").t.ppf(1.0 - tail, freedom))
    reach = quantile * sd / np.sqrt(np.maximum(counts, 1))
    return Differences(mean, mean - reach, mean + reach, sd, freedom)


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's correlation of two samples [N]; NaN where one of them is constant."""
    rank = require("scipy.stats", "train").rankdata
    a, b = rank(a) - (len(a) + 1) / 2, rank(b) - (len(b) + 1) / 2
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def matrix_correlation(
    similarity: Array, distance: Array, permutations: int = 999, seed: int = 0
) -> tuple[float, float]:
    """Rank correlation of two symmetric matrices' pairs, and how often chance alone makes it as negative.

    Pairs that share a task are not independent, so that whole tasks are permuted, not pairs. Source: Mantel, "The
    detection of disease clustering and a generalized regression approach", Cancer Research 27, 1967.

    Args:
        similarity: [n, n].
        distance: [n, n].
        permutations: of the tasks.
        seed: of the permutations.

    Returns:
        Spearman's correlation of the pairs i < j, and its one-sided p-value, at least 1 / (permutations + 1).
    """
    upper = np.triu_indices(len(similarity), 1)
    found = rank_correlation(similarity[upper], distance[upper])
    rng, as_low = np.random.default_rng(seed), 1
    for _ in range(permutations):
        order = rng.permutation(len(similarity))
        as_low += rank_correlation(similarity[np.ix_(order, order)][upper], distance[upper]) <= found
    return found, as_low / (permutations + 1)
