"""What timesteps and continuous noise levels have in common, so that every sampler works for both.

A clustering tells which levels there are and how ordinary training draws them: timesteps 0 … T-1 uniformly,
continuous levels from the clustering's distribution.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..clustering import IntervalClustering, NoiseClustering

Clustering: TypeAlias = "IntervalClustering | NoiseClustering"

_SAME = 1e-9  # probabilities closer than this are one boundary that was computed in two ways


def check_clustering(name: str, clusters: Clustering) -> None:
    """Refuse anything but a clustering."""
    if not isinstance(clusters, IntervalClustering | NoiseClustering):
        raise TypeError(
            f"{name}: expected an IntervalClustering or a NoiseClustering, found {type(clusters).__name__}"
        )


def check_same_levels(clusters: Clustering, tasks: Clustering) -> None:
    """Refuse two clusterings of different levels."""
    if _domain(clusters) != _domain(tasks):
        raise ValueError(
            f"tasks: expected a clustering of {_domain(clusters)}, as clusters is, found {_domain(tasks)}"
        )


def draw(
    clusters: Clustering, first: Tensor, last: Tensor, generator: torch.Generator | None, dtype: torch.dtype
) -> Tensor:
    """Levels as ordinary training draws them, each between two boundaries [B] of the clustering."""
    if isinstance(clusters, NoiseClustering):
        return clusters.draw(first, last, generator=generator, dtype=dtype)
    return clusters.draw(first, last, generator=generator)


def ordinary_density(clusters: Clustering, level: Tensor) -> Tensor:
    """Probability of timesteps, or probability density of continuous levels, in ordinary training."""
    if isinstance(clusters, NoiseClustering):
        return clusters.distribution.density(level)
    return torch.full(level.shape, 1.0 / clusters.num_timesteps, dtype=torch.float64, device=level.device)


def merge(clusters: Clustering, tasks: Clustering) -> Clustering:
    """The coarsest clustering that both can be made of."""
    both = np.unique(np.concatenate([clusters.probabilities, tasks.probabilities]))
    return cut(clusters, both[np.diff(both, prepend=-1.0) > _SAME])


def equal_cells(clusters: Clustering, count: int) -> Clustering:
    """``count`` intervals that ordinary training visits equally often, as far as timesteps can be divided."""
    return cut(clusters, np.arange(count + 1) / count)


def boundary_indices(grid: Clustering, probabilities: np.ndarray) -> list[int]:
    """Where boundaries are among those of a clustering that has them all."""
    return [int(np.abs(grid.probabilities - p).argmin()) for p in probabilities]


def probability_below(clusters: Clustering, level: float) -> float:
    """Share of ordinary training below a level; of a timestep beyond the schedule below 0 or above 1."""
    if isinstance(clusters, NoiseClustering):
        return float(clusters.distribution.cdf(torch.tensor(float(level), dtype=torch.float64)))
    if level != int(level):
        raise ValueError(f"expected whole timesteps, found {level}")
    return int(level) / clusters.num_timesteps


def overlaps(clusters: Clustering, cells: Clustering) -> np.ndarray:
    """Share of ordinary training that falls into both cluster k and cell c, float64 [K, C]."""
    low = np.maximum.outer(clusters.probabilities[:-1], cells.probabilities[:-1])
    high = np.minimum.outer(clusters.probabilities[1:], cells.probabilities[1:])
    return np.maximum(high - low, 0.0)


def cut(clusters: Clustering, probabilities: np.ndarray) -> Clustering:
    """The clustering of the same levels with these boundaries, 0 … 1."""
    if isinstance(clusters, NoiseClustering):
        return NoiseClustering(clusters.distribution, np.append(probabilities[:-1], 1.0))
    return IntervalClustering(np.rint(probabilities * clusters.num_timesteps).astype(np.int64))


def _domain(clusters: Clustering) -> str:
    if isinstance(clusters, NoiseClustering):
        return f"levels of {clusters.distribution}"
    return f"{clusters.num_timesteps} timesteps"
