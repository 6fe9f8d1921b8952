"""How far differences between runs go beyond the noise between seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._extras import require

Array: TypeAlias = "NDArray[np.float64]"
Counts: TypeAlias = "NDArray[np.int64]"
Bools: TypeAlias = "NDArray[np.bool_]"


@dataclass(frozen=True)
class Differences:
    """Mean differences of P pairs of methods with intervals that hold for all of them at once.

    Attributes:
        mean: float64 [P], over the seeds; NaN for a pair without any.
        low: float64 [P], lower end of the interval.
        high: float64 [P], upper end.
        seeds: int64 [P], seeds that have both of the pair.
        agreeing: int64 [P], how many of them have a difference of the mean's sign.
        own: float64 [P], standard deviation of a pair's own differences; NaN with fewer than two seeds.
        sd: standard deviation of a single difference by the model, the same for all pairs; NaN without degrees of
            freedom.
        freedom: degrees of freedom of `sd`.
    """

    mean: Array
    low: Array
    high: Array
    seeds: Counts
    agreeing: Counts
    own: Array
    sd: float
    freedom: int

    @property
    def below(self) -> Bools:
        """Bool [P], decided to be below 0: the whole interval is, and the difference of every single seed."""
        return (self.high < 0) & (self.agreeing == self.seeds)

    @property
    def above(self) -> Bools:
        """Bool [P], decided to be above 0."""
        return (self.low > 0) & (self.agreeing == self.seeds)

    @property
    def suspect(self) -> Bools:
        """Bool [P], twice as noisy as the model says, or more: the interval may be too narrow."""
        return self.own > 2 * self.sd


def blocked_differences(
    values: Array, pairs: Sequence[tuple[int, int]], confidence: float = 0.95
) -> Differences:
    """Compare methods that were run with the same seeds.

    The model is that of a randomised block design, value = method + seed + noise, the noise being independent with
    the same variance σ² for all methods. σ² is estimated from what remains after the effects of methods and seeds
    are fitted by least squares, with (M - 1)(S - 1) degrees of freedom if nothing is missing, so that runs which
    several pairs share are counted once. A mean difference over n seeds has the standard error σ √(2 / n). The
    intervals use Student's t with Bonferroni's correction for the number of pairs, which holds however the pairs
    are correlated. If a shared baseline is twice as noisy as the others, 95 % shrink to about 87 %. Source:
    Montgomery, "Design and Analysis of Experiments", randomised complete block designs.

    Args:
        values: [M, S] of M methods with S seeds, NaN where there is none.
        pairs: P pairs of methods; a difference is the first's value less the second's.
        confidence: that all intervals hold.

    Returns:
        Means and intervals; the latter are infinite without degrees of freedom, as with a single seed.
    """
    values = np.asarray(values, dtype=np.float64)
    differences = np.array([values[one] - values[other] for one, other in pairs])
    differences = differences.reshape(len(pairs), values.shape[1])
    known = np.isfinite(differences)
    counts = known.sum(1)
    mean = _mean(differences, known)
    signs = np.sign(np.where(known, differences, 0.0))
    agreeing = ((signs == np.sign(mean)[:, None]) & known).sum(1)
    deviations = np.where(known, differences - mean[:, None], 0.0)
    own = np.full(len(pairs), np.nan)
    np.sqrt(np.square(deviations).sum(1) / np.maximum(counts - 1, 1), out=own, where=counts > 1)
    sigma, freedom = _residual(values)
    if freedom:
        tail = (1.0 - confidence) / 2 / max(int((counts > 0).sum()), 1)
        quantile = float(require("scipy.stats", "train").t.ppf(1.0 - tail, freedom))
        reach = quantile * sigma * np.sqrt(2.0 / np.maximum(counts, 1))
    else:
        reach = np.full(len(pairs), np.inf)
    sd = sigma * float(np.sqrt(2.0))
    return Differences(mean, mean - reach, mean + reach, counts, agreeing, own, sd, freedom)


def relative_differences(values: Array, confidence: float = 0.95) -> Differences:
    """Compare V methods with a baseline where only their differences to it are known.

    The baseline enters `blocked_differences` as one more method, whose difference to itself is 0.

    Args:
        values: [V, S] differences to the baseline of the same seed, NaN where there is none.
        confidence: that all intervals hold.
    """
    values = np.asarray(values, dtype=np.float64)
    baseline = np.where(np.isfinite(values).any(0), 0.0, np.nan)
    pairs = [(1 + j, 0) for j in range(len(values))]
    return blocked_differences(np.vstack([baseline, values]), pairs, confidence)


def _mean(values: Array, known: Bools) -> Array:
    """The mean of the known values of every row; NaN for a row without any."""
    counts, sums = known.sum(1), np.where(known, values, 0.0).sum(1)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _residual(values: Array) -> tuple[float, int]:
    """The noise of a single run, and its degrees of freedom, by least squares of method + seed."""
    method, seed = np.nonzero(np.isfinite(values))
    design = np.hstack([np.eye(values.shape[0])[method], np.eye(values.shape[1])[seed]])
    found = values[method, seed]
    if not found.size:
        return float("nan"), 0
    fitted, _, rank, _ = np.linalg.lstsq(design, found, rcond=None)
    freedom = len(found) - int(rank)
    if not freedom:
        return float("nan"), 0
    return float(np.sqrt(np.square(found - design @ fitted).sum() / freedom)), freedom


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
