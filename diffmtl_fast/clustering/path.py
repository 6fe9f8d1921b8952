"""Optimal clusterings for every number of clusters, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .intervals import IntervalClustering

_BREAK = 10.0
_LEAST_GAIN = 1e-4
_ROUNDING = 1e-12


@dataclass(frozen=True)
class ClusterPath:
    """Optimal clusterings for consecutive k.

    The choice (``k="auto"``) looks at the gains g(k) = cost(k − 1) − cost(k), in two steps:

    1. A break: the k with the largest g(k) / g(k + 1), if that is at least 10 and g(k) at least 1e-4 of the whole
       drop of the curve. This finds the number of well-separated groups; smooth sequences have ratios below 6.
    2. Else the elbow: with both axes scaled to 0 … 1 between the first and the last k, the k whose cost lies
       furthest below the straight line between the two ends. For a smooth sequence it grows about like the
       square root of the largest k considered.

    Among equals the smallest k; the first one if the cost never falls. The choice does not change when all costs
    are scaled or shifted.

    Args:
        clusterings: for consecutive k, at least one.

    Raises:
        ValueError: the numbers of clusters are not consecutive.
    """

    clusterings: tuple[IntervalClustering, ...]

    def __post_init__(self) -> None:
        ks = [clusters.k for clusters in self.clusterings]
        if not ks or ks != list(range(ks[0], ks[0] + len(ks))):
            raise ValueError(f"clusterings: expected consecutive k, found {ks}")

    @property
    def ks(self) -> np.ndarray:
        """Numbers of clusters, int64 [n]."""
        return np.arange(self.clusterings[0].k, self.clusterings[-1].k + 1)

    @property
    def costs(self) -> np.ndarray:
        """Optimal cost for each of ``ks``, float64 [n]."""
        return np.array([clusters.cost for clusters in self.clusterings])

    @property
    def chosen(self) -> IntervalClustering:
        """The clustering at the break of the curve, or else at its elbow."""
        costs = self.costs
        drop = costs[0] - costs[-1]
        if len(costs) < 3 or not drop > 0:
            return self.clusterings[0]
        gains = -np.diff(costs) / drop
        ratios = np.where(gains[:-1] >= _LEAST_GAIN, gains[:-1] / np.maximum(gains[1:], _ROUNDING), 0.0)
        if ratios.max() >= _BREAK:
            return self.clusterings[1 + int(np.argmax(ratios))]
        below = np.linspace(1, 0, len(costs)) - (costs - costs[-1]) / drop
        return self.clusterings[int(np.argmax(below > below.max() - 1e-9)) if below.max() > 1e-9 else 0]

    def __len__(self) -> int:
        return len(self.clusterings)

    def __getitem__(self, k: int) -> IntervalClustering:
        """The optimal clustering into k intervals.

        Raises:
            KeyError: no such k on the path.
        """
        first = self.clusterings[0].k
        if not first <= k < first + len(self):
            raise KeyError(f"k: expected {first} <= k <= {first + len(self) - 1}, found {k}")
        return self.clusterings[k - first]
