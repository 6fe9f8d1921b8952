"""Balancing as published: uncertainty weighting, PCGrad's loop over vectors, Nash-MTL's convex programmes."""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmtl_fast._extras import require

Array = NDArray[np.float64]


class NashError(RuntimeError):
    """The Nash bargaining solution was not found; the released code would go on with stale weights."""


def update_direction(jacobian: Tensor, weights: Tensor, present: Tensor) -> Tensor:
    """Combine cluster gradients into one update, d = (1/n) Σ w_k g_k over the n present clusters.

    With w = 1 this is the gradient of the mean of the present clusters' losses. The papers divide by K: the
    same, unless a cluster is absent.

    Args:
        jacobian: [K, P].
        weights: [K].
        present: [K] bool.

    Returns:
        [P].
    """
    return (weights * present).to(jacobian.dtype) @ jacobian / present.sum()


def uncertainty_weighting(losses: Tensor, log_variances: Tensor, present: Tensor) -> Tensor:
    """Weigh losses by learned uncertainty, Σ ½ (e^{−u_k} L_k / n + u_k) over the n present clusters.

    Kendall et al. (2018) as Go et al. (2023) train it. The u_k of an absent cluster gets a zero gradient.

    Args:
        losses: [K], cluster losses.
        log_variances: [K], u.
        present: [K] bool.

    Returns:
        The scalar to minimise in the model's parameters and in u.
    """
    u, mean_losses = log_variances[present], losses[present] / present.sum()
    return 0.5 * (torch.exp(-u) * mean_losses + u).sum()


def random_orders(num_clusters: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw for every cluster the random order in which PCGrad visits the others.

    Returns:
        [K, K-1] int64, row k a permutation of all clusters but k.
    """
    orders = [torch.randperm(num_clusters, generator=generator) for _ in range(num_clusters)]
    return torch.stack([order[order != k] for k, order in enumerate(orders)])


def pcgrad(jacobian: Tensor, orders: Tensor) -> Tensor:
    """Project conflicting gradients, vector by vector (Yu et al., 2020).

    Each g_k' starts as g_k and, in the order given, loses its component along every g_j it points against;
    the g_j are the original ones. The released code of Go et al. also visits j = k, which the paper does not.
    A zero row (an absent cluster) conflicts with nothing, so no mask is needed. An oracle wants the Jacobian in
    float64: in float32 the dot products of millions of elements cost up to two digits.

    Args:
        jacobian: [K, P].
        orders: [K, K-1] int64, row k the clusters other than k in the order of projection.

    Returns:
        [P], Σ_k g_k'; the update is this sum over the number of present clusters.

    Raises:
        ValueError: a row of ``orders`` is not a permutation of the other clusters.
    """
    num_clusters = len(jacobian)
    projected = jacobian.clone()
    for k, order in enumerate(orders.tolist()):
        if sorted(order) != [j for j in range(num_clusters) if j != k]:
            raise ValueError(f"orders[{k}]: expected a permutation of all clusters but {k}, found {order}")
        for j in order:
            inner = torch.dot(projected[k], jacobian[j])
            if inner < 0:
                projected[k] -= inner / jacobian[j].norm() ** 2 * jacobian[j]
    return projected.sum(0)


def nash_residual(gramian: Array, weights: Array) -> float:
    """Return max |α_k (Ĝα)_k − 1|, Ĝ = G / ‖G‖_F: zero exactly at the Nash bargaining solution."""
    unit = gramian / np.linalg.norm(gramian)
    return float(np.abs(weights * (unit @ weights) - 1).max())


def nash_weights(
    gramian: Tensor,
    present: Tensor | None = None,
    *,
    start: Array | None = None,
    iterations: int = 20,
    tolerance: float = 1e-3,
    recompile: bool = False,
) -> Tensor:
    """Solve Ĝα = 1/α, Ĝ = G / ‖G‖_F, by the published convex-concave procedure.

    Navon et al., "Multi-Task Learning as a Bargaining Game" (2022): minimise Σ_k (Ĝα)_k + φ(α) subject to
    φ_k(α) = log α_k + log (Ĝα)_k ≥ 0, with φ = Σ φ_k linearised around the last iterate and each convex
    programme solved by ECOS.

    Two deviations from the released code: a solver that fails or does not converge raises, and the programme
    is stated for Ĝ alone, whereas theirs also has ‖G‖_F in the constraints, which shrinks their α by √‖G‖_F
    and lets their stopping rule compare two scales.

    Args:
        gramian: [K, K].
        present: [K] bool, all by default; the game is played by the present clusters alone.
        start: [n] first iterate for the n present clusters, ones by default (the released code starts there,
            then from the last step's weights).
        iterations: most convex programmes solved.
        tolerance: largest accepted max |α_k (Ĝα)_k − 1|.
        recompile: leave the linearisation to cvxpy as the released code does; cvxpy then compiles the
            programme anew in every iteration. Same programme, slower: for timing what was published.

    Returns:
        [K] float64 on the CPU, zero for absent clusters.

    Raises:
        ImportError: cvxpy or ECOS is not installed.
        NashError: no programme of the sequence led to a solution within ``tolerance``.
    """
    _require_ecos()
    gramian = gramian.detach().to("cpu", torch.float64)
    mask = torch.ones(len(gramian), dtype=torch.bool) if present is None else present.cpu()
    game = gramian[mask][:, mask].numpy()
    weights = torch.zeros(len(gramian), dtype=torch.float64)
    weights[mask] = torch.from_numpy(_bargain(game, start, iterations, tolerance, recompile))
    return weights


def _bargain(
    gramian: Array, start: Array | None, iterations: int, tolerance: float, recompile: bool
) -> Array:
    norm = np.linalg.norm(gramian)
    if not (np.isfinite(norm) and norm > 0):
        raise NashError(f"gramian: expected finite and not all zero, found Frobenius norm {norm}")
    unit = gramian / norm
    alpha = np.ones(len(gramian)) if start is None else start
    for _ in range(iterations):
        if nash_residual(gramian, alpha) <= tolerance:
            break
        last, alpha = alpha, _solve(unit, alpha, recompile)
        if np.linalg.norm(alpha - last) < 1e-6:
            break
    # Weights left at the start (all ones, if a solver did nothing) pass only if they are the solution.
    residual = nash_residual(gramian, alpha)
    if not residual <= tolerance:
        raise NashError(f"expected max |α(Ĝα) − 1| <= {tolerance}, found {residual:.3g} with weights {alpha}")
    return alpha


@cache
def _require_ecos() -> None:
    """Refuse to run without the published solver: cvxpy >= 1.6 no longer brings it."""
    solvers = require("cvxpy", "bench").installed_solvers()
    if "ECOS" not in solvers:
        raise ImportError(
            f"expected cvxpy to find the solver ECOS, found {', '.join(solvers)}; "
            "run `pip install 'diffmtl-fast[bench]'`"
        )


@cache
def _programme(size: int, recompile: bool) -> SimpleNamespace:
    """State the convex programme around a last iterate, once per size."""
    import cvxpy as cp

    alpha = cp.Variable(size, nonneg=True)
    gramian = cp.Parameter((size, size))
    last = cp.Parameter(size, pos=True)
    # cvxpy compiles once only what is affine in its parameters: the slope as a number, not as a formula of α.
    slope = _slope(gramian, last) if recompile else cp.Parameter(size)
    g_alpha = gramian @ alpha
    constraints = [cp.log(alpha) + cp.log(g_alpha) >= 0]
    problem = cp.Problem(cp.Minimize(cp.sum(g_alpha) + slope @ alpha), constraints)
    return SimpleNamespace(alpha=alpha, gramian=gramian, last=last, slope=slope, problem=problem)


def _slope(gramian: Any, alpha: Any) -> Any:
    """∇φ(α), φ(α) = Σ_k log α_k + log (Ĝα)_k."""
    return 1 / alpha + (1 / (gramian @ alpha)) @ gramian


def _solve(unit: Array, alpha: Array, recompile: bool) -> Array:
    import cvxpy as cp

    programme = _programme(len(unit), recompile)
    if not (alpha.min() > 0 and (unit @ alpha).all()):
        raise NashError(f"expected an iterate α > 0 with Ĝα ≠ 0, found α = {alpha}, Ĝα = {unit @ alpha}")
    programme.gramian.value, programme.last.value = unit, alpha
    if isinstance(programme.slope, cp.Parameter):
        programme.slope.value = _slope(unit, alpha)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="You are solving a parameterized problem that is not DPP"
            )
            programme.problem.solve(solver=cp.ECOS, warm_start=True, max_iters=100)
    except cp.SolverError as error:
        raise NashError(f"ECOS failed on the normalised Gramian {unit.tolist()}") from error
    if programme.problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise NashError(f"expected an optimal programme, found {programme.problem.status}")
    return np.asarray(programme.alpha.value, dtype=np.float64)
