"""Optimal clusterings for every number of clusters, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .intervals import IntervalClustering


@dataclass(frozen=True)
class ClusterPath:
    """Optimal clusterings for consecutive k.

    The choice (``k="auto"``) is the elbow of the curve of costs: scale both axes to 0 … 1 between the first
    and the last k; the elbow is the k whose cost lies furthest below the straight line between the two ends,
    the smallest among equals (within 1e-9), and the first k where no cost lies below it. It does not change
    when all costs are scaled or shifted. It finds the number of well-separated groups; a smooth sequence has
    none, and the choice then grows about like the square root of the largest k considered.

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
        """The clustering at the elbow of the curve."""
        costs = self.costs
        drop = costs[0] - costs[-1]
        if len(costs) < 3 or not drop > 0:
            return self.clusterings[0]
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
