"""`nash_weights`: the Nash bargaining weights, by a damped Newton method on K unknowns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._host import on_host
from ._checks import check_present, check_same_device, check_square
from ._gramians import unit_gramian
from ._library import define_op, refuse_autograd

# With an exact line search the method needs 5 to 7 steps; 18 is the most seen in thousands of Gramians, ones
# without a solution and ones whose norms differ by 10¹² among them.
NEWTON_STEPS = 32
LINE_SEARCH_STEPS = 6
CONVERGED = 1e-6  # Newton decrement before the last step, which squares it


def ridge_unit(dtype: torch.dtype) -> float:
    """Return δ for Gramians of a dtype: the unit of the ridge that keeps the weights bounded."""
    return math.sqrt(torch.finfo(dtype).eps)


def nash_weights_plain(gramian: Tensor, present: Tensor) -> Tensor:
    """Compute `nash_weights` by its definition, in the unknowns β_k = α_k ‖g_k‖."""
    cosines, norms, active, finite = unit_gramian(gramian, present)
    beta = _minimise_barrier(cosines, active, ridge_unit(gramian.dtype))
    # The published method divides G by its Frobenius norm first; in the unknowns that is a factor of its root.
    largest = torch.where(active, norms, 0).amax()
    relative = torch.where(active, norms / largest, 0)
    frobenius = torch.linalg.matrix_norm(cosines * relative.unsqueeze(0) * relative.unsqueeze(1))
    weights = torch.where(active, beta * frobenius.sqrt() * (largest / norms), 0)
    return torch.where(finite, weights, torch.nan).to(gramian.dtype)


def _minimise_barrier(matrix: Tensor, active: Tensor, unit: float) -> Tensor:
    """Minimise ½ βᵀCβ − Σ log β_k + (n/4) max(0, δ|β|²/n − 1)² over the n active β_k > 0; `unit` is δ.

    Rows outside `active` are those of the identity, and their β stays 1.
    """
    ones = torch.where(active, 1.0, 0.0).to(matrix.dtype)
    n = ones.sum().clamp(min=1)
    # The minimum along the ray of equal β, or where the ridge begins.
    beta = torch.where(active, torch.sqrt(n / torch.maximum(ones @ matrix @ ones, n * unit)), 1.0)
    for _ in range(NEWTON_STEPS):
        counted = beta * ones
        excess = torch.clamp(unit / n * counted.square().sum() - 1, min=0)
        gradient = matrix @ beta + unit * excess * counted - 1 / beta
        hessian = matrix + torch.diag(beta**-2 + unit * excess)
        hessian = hessian + torch.where(excess > 0, 2 * unit**2 / n, 0) * counted.outer(counted)
        factor, _ = torch.linalg.cholesky_ex(hessian)
        step = -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1) * ones
        descent = -(gradient @ step)  # the decrement's square; below 0 where only rounding is left
        last = ~(descent > CONVERGED**2)
        length = torch.where(last, 1.0, _line_search(matrix, counted, step, descent, unit / n, n))
        beta = beta + torch.where(descent > 0, length * step, 0)
        # Reading this stalls an accelerator, so only the CPU leaves early; further steps change nothing.
        if on_host(matrix) and last:
            break
    return beta


def _line_search(
    matrix: Tensor, beta: Tensor, step: Tensor, descent: Tensor, share: Tensor, n: Tensor
) -> Tensor:
    """Minimise the objective along `step` by Newton's method in one unknown, staying inside β > 0.

    `beta` is 0 where it does not count, and `share` is δ/n.
    """
    slope, curvature = beta @ matrix @ step, step @ matrix @ step
    square, mixed, bend = share * (beta @ beta), share * (beta @ step), share * (step @ step)
    ratio = torch.where(beta > 0, step / beta, 0)
    limit = torch.where(ratio < 0, -1 / ratio, torch.inf).min()
    length = 1 / (1 + descent.sqrt())  # always inside, and a sure decrease
    for _ in range(LINE_SEARCH_STEPS):
        slack = ratio / (1 + length * ratio)
        excess = torch.clamp(square + length * (2 * mixed + length * bend) - 1, min=0)
        growth = mixed + length * bend
        first = slope + length * curvature - slack.sum() + n * excess * growth
        second = curvature + slack.square().sum() + n * excess * bend
        second = second + torch.where(excess > 0, 2 * n * growth.square(), 0)
        tried = length - first / second
        # Halve the way to a bound that the step would cross. At the minimum 0/0 leaves the length as it is.
        tried = torch.where(tried <= 0, length / 2, torch.where(tried >= limit, (length + limit) / 2, tried))
        length = torch.where(tried.isfinite(), tried, length)
    return length


_nash_weights = define_op(
    "nash_weights(Tensor gramian, Tensor present) -> Tensor",
    plain=nash_weights_plain,
    fake=lambda gramian, present: gramian.new_empty(gramian.shape[:1]),
)
refuse_autograd("nash_weights", "its weights are constants of the update; detach the Gramian")


def nash_weights(gramian: Tensor, present: Tensor | None = None) -> Tensor:
    """Nash bargaining weights: the α > 0 with G̃ α = 1/α, G̃ = G / ‖G‖_F over the present clusters.

    α is the unique minimiser of the strictly convex ½ αᵀG̃α − Σ log α_k, whose gradient is G̃α − 1/α; Newton's
    method finds it. Dividing by the Frobenius norm makes the weights independent of the gradients' scale, so a
    loss scaler changes nothing.

    A solution exists where some direction d improves all clusters, ⟨g_k, d⟩ > 0. Where there is none (two opposed
    gradients), or where G is too close to that for its rounding, α is the solution with a ridge that is relative
    to each gradient: with the cosines C_kl = G_kl / (‖g_k‖ ‖g_l‖), n clusters and δ = √eps of the dtype of G,
    β_k = α_k ‖g_k‖ / √‖G‖_F is the unique solution of

        (C + μI) β = 1/β,  μ = δ max(0, δ|β|²/n − 1).

    It minimises ½ βᵀCβ − Σ log β_k + (n/4) max(0, δ|β|²/n − 1)². So α depends on G continuously, rounding moves it
    by about √eps at most, and it is the exact solution, μ = 0, wherever that has |β|² ≤ n/δ: wherever some
    direction has a cosine of √δ (1.2e-4 in float64, 0.019 in float32) or more with every gradient.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, claim 3.1. The published solver
    iterates a convex-concave procedure towards the same point. The ridge is ours.

    Args:
        gramian: G, [K, K], floating point, symmetric positive semidefinite, in the dtype its sums were formed in:
            that dtype's rounding decides how far G can be trusted.
        present: bool [K]; an absent cluster takes no part, whatever stands in its row and column of G. Default:
            all present.

    Returns:
        α, [K], in the dtype of G (computed in float64, right for gradients of any scale whose Gramian that dtype
        can hold). An absent cluster gets 0, and so does one whose gradient is zero, which has nothing to weigh.
        NaN everywhere where G is not finite for the present clusters.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: a shape or device does not fit.
    """
    check_square("gramian", gramian)
    present = (
        torch.ones(gramian.shape[0], dtype=torch.bool, device=gramian.device) if present is None else present
    )
    check_present(present, gramian.shape[0])
    check_same_device(gramian=gramian, present=present)
    return _nash_weights(gramian, present)
