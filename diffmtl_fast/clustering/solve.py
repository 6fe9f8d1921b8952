"""Exact clustering of timesteps into contiguous intervals.

Ties, everywhere: the most equal sizes (the smallest sum of squares), then the smallest last boundary, then
the smallest one before it, and so on.

Solvers: ``"divide"``, divide and conquer in O(K T log T) for costs with the quadrangle inequality;
``"penalised"``, a search over the price of an interval in O(T) memory, for large K and the costs of this
package alone; ``"dense"``, the O(K T²) programme for any cost; ``"auto"`` chooses. Where they apply they
return the same boundaries, with two exceptions. The squared cost is rounded to 73 bits or more of the largest
cost of an interval, and what differs by less may go either way (see :class:`SquaredDeviation`). And where the
optimal cost falls by exactly the same amount over a long range of K, ``"penalised"`` picks any boundaries of
the optimal cost and sum of squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import torch

from .costs import AbsoluteDeviation, Affinity, Cost, FunctionCost, MatrixCost, Values, as_integer
from .intervals import IntervalClustering
from .path import ClusterPath

Solver: TypeAlias = Literal["auto", "divide", "penalised", "dense"]
NumClusters: TypeAlias = "int | Literal['auto']"
AnyCost: TypeAlias = "Cost | Callable[[int, int], float] | Values"

_K_MAX = 20
_MAX_TIMESTEPS = 2**28  # of the solvers, whose positions are 32-bit


def cluster_timesteps(
    num_timesteps: int,
    k: NumClusters,
    *,
    min_size: int | None = None,
    max_size: int | None = None,
    k_max: int = _K_MAX,
    solver: Solver = "auto",
    threads: int | None = None,
) -> IntervalClustering:
    """Minimise Σ_clusters Σ_t |t − t_c|, t_c the middle timestep: intervals as equal as can be.

    Args:
        num_timesteps: number of timesteps T.
        k: number of clusters, 1 … T, or ``"auto"`` (see :class:`ClusterPath`).
        min_size: fewest timesteps in a cluster, default 1.
        max_size: most timesteps in a cluster, default T.
        k_max: the most clusters that ``"auto"`` considers.
        solver: see the module.
        threads: default ``torch.get_num_threads()``.

    Returns:
        The optimal clustering.

    Raises:
        TypeError: ``num_timesteps``, ``k`` or a size limit is no integer.
        ValueError: ``num_timesteps`` is not 1 … 2^28, or ``k`` or a size limit cannot be met.
    """
    num_timesteps = _positive("num_timesteps", num_timesteps)
    if num_timesteps > _MAX_TIMESTEPS:
        raise ValueError(f"num_timesteps: expected at most {_MAX_TIMESTEPS}, found {num_timesteps}")
    cost = AbsoluteDeviation(np.arange(num_timesteps, dtype=np.float64))
    return _cluster(cost, k, min_size, max_size, k_max, solver, threads)


def cluster_snr(
    log_snr: Values,
    k: NumClusters,
    *,
    min_size: int | None = None,
    max_size: int | None = None,
    k_max: int = _K_MAX,
    solver: Solver = "auto",
    threads: int | None = None,
) -> IntervalClustering:
    """Minimise Σ_clusters Σ_t |s(t) − s(t_c)|, s the log-SNR, t_c the middle timestep of the cluster.

    The clustering of Go et al., "Addressing Negative Transfer in Diffusion Models" (NeurIPS 2023, arXiv
    2306.00354), with the cost :class:`AbsoluteDeviation`. Deviation: log-SNR instead of raw SNR, whose
    clusters degenerate.

    Args:
        log_snr: [T], finite, non-decreasing or non-increasing; used in float64.
        k: number of clusters, 1 … T, or ``"auto"`` (see :class:`ClusterPath`).
        min_size: fewest timesteps in a cluster, default 1.
        max_size: most timesteps in a cluster, default T.
        k_max: the most clusters that ``"auto"`` considers.
        solver: see the module.
        threads: default ``torch.get_num_threads()``.

    Returns:
        The optimal clustering.

    Raises:
        ValueError: a value is not finite or breaks the order (the message names its index), or ``k`` or a
            size limit cannot be met.
    """
    return _cluster(AbsoluteDeviation(log_snr, "log_snr"), k, min_size, max_size, k_max, solver, threads)


def cluster_affinity(
    tas: Values,
    k: NumClusters,
    *,
    min_size: int | None = None,
    max_size: int | None = None,
    k_max: int = _K_MAX,
    threads: int | None = None,
) -> IntervalClustering:
    """Minimise −Σ_clusters Σ_t TAS(t_c, t), t_c the middle timestep of the cluster.

    The gradient clustering of Go et al. (arXiv 2306.00354), with the cost :class:`Affinity`.

    Args:
        tas: task affinity [T, T], finite; row t_c holds the affinity of t_c to every t. float32 or float64 is
            used in place.
        k: number of clusters, 1 … T, or ``"auto"`` (see :class:`ClusterPath`).
        min_size: fewest timesteps in a cluster, default 1.
        max_size: most timesteps in a cluster, default T.
        k_max: the most clusters that ``"auto"`` considers.
        threads: default ``torch.get_num_threads()``.

    Returns:
        The optimal clustering.

    Raises:
        ValueError: the matrix is not square or not finite, or ``k`` or a size limit cannot be met.
    """
    return _cluster(Affinity(tas), k, min_size, max_size, k_max, "auto", threads)


def cluster_intervals(
    cost: AnyCost,
    num_timesteps: int | None = None,
    k: NumClusters = "auto",
    *,
    monge: bool = False,
    min_size: int | None = None,
    max_size: int | None = None,
    k_max: int = _K_MAX,
    solver: Solver = "auto",
    threads: int | None = None,
) -> IntervalClustering:
    """Minimise the sum of any interval cost.

    Args:
        cost: an ``@numba.njit`` function ``cost(l, r)`` of the timesteps l … r, both included; or a matrix
            [T, T] of these; or one of the costs of this package (:class:`SquaredDeviation`, …).
        num_timesteps: number of timesteps T; needed for a function.
        k: number of clusters, 1 … T, or ``"auto"`` (see :class:`ClusterPath`).
        monge: whether a function or matrix satisfies the quadrangle inequality; see :class:`MatrixCost`.
        min_size: fewest timesteps in a cluster, default 1.
        max_size: most timesteps in a cluster, default T.
        k_max: the most clusters that ``"auto"`` considers.
        solver: see the module.
        threads: default ``torch.get_num_threads()``.

    Returns:
        The optimal clustering.

    Raises:
        TypeError: the function is not compiled by Numba.
        ValueError: ``k`` or a size limit cannot be met, a cost is NaN or raised, or the inequality fails.
    """
    known = _as_cost(cost, num_timesteps, monge)
    return _cluster(known, k, min_size, max_size, k_max, solver, threads)


def cluster_path(
    cost: AnyCost,
    k_max: int = _K_MAX,
    *,
    num_timesteps: int | None = None,
    monge: bool = False,
    min_size: int | None = None,
    max_size: int | None = None,
    threads: int | None = None,
) -> ClusterPath:
    """The optimal clustering for every k up to ``k_max``, in one run.

    With the quadrangle inequality the optimum of k intervals leaves that of k + 1 windows of T positions in
    all, so each costs O(T log T) and memory stays O(T). The dense programme yields all of them at once.

    Args:
        cost: as in :func:`cluster_intervals`.
        k_max: the most clusters; reduced to what T and ``min_size`` allow.
        num_timesteps: number of timesteps T; needed for a function.
        monge: whether a function or matrix satisfies the quadrangle inequality.
        min_size: fewest timesteps in a cluster, default 1.
        max_size: most timesteps in a cluster, default T; the path starts where it can be met.
        threads: default ``torch.get_num_threads()``.

    Returns:
        The clusterings by k.

    Raises:
        TypeError: the function is not compiled by Numba.
        ValueError: no k up to ``k_max`` is possible.
    """
    return _path(_as_cost(cost, num_timesteps, monge), k_max, min_size, max_size, "auto", threads)


def _as_cost(cost: AnyCost, num_timesteps: int | None, monge: bool) -> Cost:
    if callable(cost):
        if num_timesteps is None:
            raise TypeError("num_timesteps: expected the number of timesteps of a cost function, found None")
        return FunctionCost(cost, num_timesteps, monge)
    known = cost if isinstance(cost, Cost) else MatrixCost(cost, monge)
    if num_timesteps is not None:
        num_timesteps = as_integer(num_timesteps, "num_timesteps")
    if num_timesteps not in (None, known.num_timesteps):
        raise ValueError(f"num_timesteps: expected {known.num_timesteps}, found {num_timesteps}")
    return known


def _cluster(
    cost: Cost,
    k: NumClusters,
    min_size: int | None,
    max_size: int | None,
    k_max: int,
    solver: Solver,
    threads: int | None,
) -> IntervalClustering:
    if isinstance(k, str):
        if k != "auto":
            raise ValueError(f"k: expected an integer or 'auto', found {k!r}")
        return _path(cost, k_max, min_size, max_size, solver, threads).chosen
    k = as_integer(k, "k")
    low, high = _limits(min_size, max_size, cost.num_timesteps)
    (solution,) = cost.solve(k, k, low, high, solver, _threads(threads))
    return _clustering(solution)


def _path(
    cost: Cost,
    k_max: int,
    min_size: int | None,
    max_size: int | None,
    solver: Solver,
    threads: int | None,
) -> ClusterPath:
    k_max = _positive("k_max", k_max)
    total = cost.num_timesteps
    low, high = _limits(min_size, max_size, total)
    first, last = -(-total // max(high, 1)), max(1, min(k_max, total // max(low, 1)))
    if first > last:
        raise ValueError(
            f"expected a k of at most {k_max} that T = {total}, min_size = {low} and max_size = {high} allow, "
            "found none"
        )
    return ClusterPath(
        tuple(_clustering(s) for s in cost.solve(first, last, low, high, solver, _threads(threads)))
    )


def _clustering(solution: tuple[np.ndarray, float]) -> IntervalClustering:
    boundaries, cost = solution
    if not len(boundaries):
        raise ValueError("cost: expected a partition of finite cost, found infinity for all of them")
    return IntervalClustering(boundaries, cost)


def _limits(min_size: int | None, max_size: int | None, num_timesteps: int) -> tuple[int, int]:
    low = 1 if min_size is None else as_integer(min_size, "min_size")
    return low, max(num_timesteps, low) if max_size is None else as_integer(max_size, "max_size")


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else as_integer(threads, "threads")


def _positive(name: str, value: int) -> int:
    value = as_integer(value, name)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, found {value}")
    return value
