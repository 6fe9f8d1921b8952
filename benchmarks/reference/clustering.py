"""The published interval clustering: a Python dynamic programme that evaluates every interval's cost anew.

Kept as slow as published, O(K T²) cost evaluations of O(T) each, and free of the released code's faults:
boundaries one step early, splits of zero cost thrown away, the last bound fixed at 1000, the centre rounded
half to even.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: c(l, r) of the half-open interval l..r-1
Cost = Callable[[int, int], float]


def _middle(left: int, right: int) -> int:
    """The middle element: ⌊(l + last + 1) / 2⌋ with last = r − 1."""
    return (left + right) // 2


def timestep_cost() -> Cost:
    """Σ |t − t_c|, the distance of an interval's timesteps to its middle one."""

    def cost(left: int, right: int) -> float:
        return float(np.abs(np.arange(left, right) - _middle(left, right)).sum())

    return cost


def snr_cost(log_snr: Array) -> Cost:
    """Σ |s(t) − s(t_c)| of a log-SNR curve s of shape [T]."""

    def cost(left: int, right: int) -> float:
        return float(np.abs(log_snr[left:right] - log_snr[_middle(left, right)]).sum())

    return cost


def affinity_cost(affinity: Array) -> Cost:
    """−Σ TAS(t_c, t) of a [T, T] matrix of task affinity scores."""

    def cost(left: int, right: int) -> float:
        return -float(affinity[_middle(left, right), left:right].sum())

    return cost


def optimal_intervals(cost: Cost, num_timesteps: int, k: int) -> tuple[NDArray[np.int64], float]:
    """Partition 0..T-1 into K contiguous intervals of least total cost, D[e, j] = min_s D[s, j−1] + c(s, e).

    Args:
        cost: c(l, r) of the half-open interval l..r-1.
        num_timesteps: T.
        k: K, 1 <= K <= T.

    Returns:
        Boundaries [K + 1], 0 first and T last, and the total cost. Of several optima the one whose splits lie
        lowest, found from the last interval backwards.

    Raises:
        ValueError: K out of range.
    """
    if not 1 <= k <= num_timesteps:
        raise ValueError(f"k: expected 1 <= k <= T = {num_timesteps}, found {k}")
    best = np.full((num_timesteps + 1, k + 1), np.inf)
    split = np.zeros((num_timesteps + 1, k + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for j in range(1, k + 1):
        for end in range(j, num_timesteps + 1):
            starts = range(j - 1, end)
            totals = [best[start, j - 1] + cost(start, end) for start in starts]
            choice = int(np.argmin(totals))
            best[end, j], split[end, j] = totals[choice], starts[choice]
    boundaries = [num_timesteps]
    for j in range(k, 0, -1):
        boundaries.append(split[boundaries[-1], j])
    return np.array(boundaries[::-1], dtype=np.int64), float(best[num_timesteps, k])
