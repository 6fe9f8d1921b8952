"""`nash_weights`: the Nash bargaining weights, by a damped Newton method on K unknowns."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_present, check_same_device, check_square
from ._library import define_op, refuse_autograd

# With an exact line search the method needs 5 to 7 steps; 16 is the most seen in thousands of Gramians up to
# K = 64, singular ones and ones whose norms differ by 10⁸ among them.
NEWTON_STEPS = 32
LINE_SEARCH_STEPS = 6
CONVERGED = 1e-10  # Newton decrement: the residual |α(Gα) − 1| is of its size


def nash_weights_plain(gramian: Tensor, present: Tensor) -> Tensor:
    """Compute `nash_weights` by its definition.

    The unknowns are scaled to β_k = α_k ‖g_k‖, so that the matrix has a unit diagonal whatever the gradients'
    norms. Where it is singular (two exactly opposed gradients) the bargaining problem has no solution; the matrix
    is known only up to rounding, and adding that rounding, K·eps, to its diagonal makes it solvable.
    """
    gram = gramian.double()
    k = gram.shape[0]
    active = present & (gram.diagonal() > 0)
    pairs = active.unsqueeze(0) & active.unsqueeze(1)
    gram = torch.where(pairs, gram, 0)
    inverse_norms = torch.where(active, gram.diagonal(), 1).rsqrt()
    cosines = gram * inverse_norms.unsqueeze(0) * inverse_norms.unsqueeze(1)
    unit = 1 + k * torch.finfo(gramian.dtype).eps
    cosines = (
        cosines - torch.diag(cosines.diagonal()) + unit * torch.eye(k, dtype=gram.dtype, device=gram.device)
    )
    beta = _minimise_barrier(cosines, active)
    # The published method divides G by its Frobenius norm first; in the unknowns that is this factor.
    weights = beta * inverse_norms * torch.linalg.matrix_norm(gram).sqrt()
    weights = torch.where(active, weights, 0)
    finite = torch.where(present, gramian.diagonal(), 0).sum().isfinite()
    return torch.where(finite, weights, torch.nan).to(gramian.dtype)


def _minimise_barrier(matrix: Tensor, active: Tensor) -> Tensor:
    """Minimise ½ βᵀMβ − Σ log β_k over β > 0; rows outside `active` are unit rows of M and stay harmless."""
    ones = torch.where(active, 1.0, 0.0).to(matrix.dtype)
    curvature = torch.clamp(ones @ matrix @ ones, min=torch.finfo(matrix.dtype).tiny)
    # The minimum along the ray of equal β.
    beta = torch.where(active, torch.sqrt(ones.sum() / curvature), 1.0)
    for _ in range(NEWTON_STEPS):
        gradient = matrix @ beta - 1 / beta
        factor, _ = torch.linalg.cholesky_ex(matrix + torch.diag(beta**-2))
        step = -torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
        decrement = torch.clamp(-(gradient @ step), min=0).sqrt()
        # Reading the decrement stalls an accelerator, so only the CPU leaves early; further steps change nothing.
        if matrix.device.type == "cpu" and not decrement > CONVERGED:
            break
        beta = beta + _line_search(matrix, beta, step, decrement) * step
    return beta


def _line_search(matrix: Tensor, beta: Tensor, step: Tensor, decrement: Tensor) -> Tensor:
    """Minimise the objective along `step` by Newton's method in one unknown, staying inside β > 0."""
    slope, curvature = (matrix @ beta) @ step, step @ matrix @ step
    ratio = step / beta
    limit = torch.where(ratio < 0, -1 / ratio, torch.inf).min()
    length = 1 / (1 + decrement)  # always inside, and a sure decrease
    for _ in range(LINE_SEARCH_STEPS):
        slack = ratio / (1 + length * ratio)
        tried = length - (slope + length * curvature - slack.sum()) / (curvature + slack.square().sum())
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

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, claim 3.1. The published solver
    iterates a convex-concave procedure towards the same point.

    Args:
        gramian: G, [K, K], floating point, symmetric positive semidefinite, in the dtype its sums were formed in:
            that dtype's rounding is what a singular G is known up to.
        present: bool [K]. Default: all present.

    Returns:
        α, [K], in the dtype of G (computed in float64). An absent cluster gets 0, and so does one whose gradient
        is zero, which has nothing to weigh. NaN everywhere where a present cluster's gradient is not finite.

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
