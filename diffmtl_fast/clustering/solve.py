"""Exact clustering of timesteps into contiguous intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from .._native import _C
from .intervals import IntervalClustering

Values: TypeAlias = "np.ndarray | Tensor | Sequence[float]"


def cluster_timesteps(
    num_timesteps: int, k: int, *, min_size: int | None = None, max_size: int | None = None
) -> IntervalClustering:
    """Minimise Σ_clusters Σ_t |t − t_c|, t_c the middle timestep: intervals as equal as can be.

    Args:
        num_timesteps: number of timesteps T.
        k: number of clusters, 1 … T.
        min_size: fewest timesteps in a cluster, default 1.
        max_size: most timesteps in a cluster, default T.

    Returns:
        The optimal clustering; see :func:`cluster_snr` for ties.

    Raises:
        ValueError: ``k`` or a size limit cannot be met.
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps: expected at least 1, found {num_timesteps}")
    return cluster_snr(np.arange(num_timesteps, dtype=np.float64), k, min_size=min_size, max_size=max_size)


def cluster_snr(
    log_snr: Values, k: int, *, min_size: int | None = None, max_size: int | None = None
) -> IntervalClustering:
    """Minimise Σ_clusters Σ_t |s(t) − s(t_c)|, s the log-SNR, t_c the middle timestep of the cluster.

    The clustering of Go et al., "Addressing Negative Transfer in Diffusion Models" (NeurIPS 2023, arXiv
    2306.00354). t_c has index ⌊(l + r + 1) / 2⌋ in an interval l … r; as s is monotone it is a median. Among equal
    costs the most equal sizes win (smallest sum of squares), then the smallest last boundary, then the smallest
    one before it, and so on.

    Deviation: log-SNR instead of raw SNR, whose clusters degenerate; the last boundary is T.

    Args:
        log_snr: [T], finite, non-decreasing or non-increasing; used in float64.
        k: number of clusters, 1 … T.
        min_size: fewest timesteps in a cluster, default 1.
        max_size: most timesteps in a cluster, default T.

    Returns:
        The optimal clustering.

    Raises:
        ValueError: a value is not finite or breaks the order (the message names its index), or ``k`` or a
            size limit cannot be met.
    """
    values = as_float64(log_snr, "log_snr")
    low, high = _limits(min_size, max_size, values.size)
    return IntervalClustering(*_C.cluster_absolute(values, k, low, high, "log_snr"))


def cluster_affinity(
    tas: Values, k: int, *, min_size: int | None = None, max_size: int | None = None
) -> IntervalClustering:
    """Minimise −Σ_clusters Σ_t TAS(t_c, t), t_c the middle timestep of the cluster.

    The gradient clustering of Go et al. (arXiv 2306.00354). Centre and ties as in :func:`cluster_snr`.

    Args:
        tas: task affinity [T, T], finite; row t_c holds the affinity of t_c to every t.
        k: number of clusters, 1 … T.
        min_size: fewest timesteps in a cluster, default 1.
        max_size: most timesteps in a cluster, default T.

    Returns:
        The optimal clustering.

    Raises:
        ValueError: the matrix is not square or not finite, or ``k`` or a size limit cannot be met.
    """
    matrix = as_float64(tas, "tas")
    low, high = _limits(min_size, max_size, len(matrix))
    return IntervalClustering(*_C.cluster_affinity(matrix, k, low, high))


def as_float64(values: Values, name: str) -> np.ndarray:
    """Values as a float64 array, without a copy where they already are.

    Raises:
        TypeError: not numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected real numbers ({error})") from error


def _limits(min_size: int | None, max_size: int | None, num_timesteps: int) -> tuple[int, int]:
    """Size limits with their defaults."""
    return (
        1 if min_size is None else min_size,
        max(num_timesteps, 1 if min_size is None else min_size) if max_size is None else max_size,
    )
