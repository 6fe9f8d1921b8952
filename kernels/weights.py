"""Weights from the Gramian, each in one program: the K×K problem lives in registers, in float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _unit_gramian(p_gram, p_present, o, K: tl.constexpr):
    """Return cosines, norms, active, present and finite: see ops/_gramians.py."""
    m = o < K
    m_present = m & (tl.load(p_present + o, mask=m, other=0) != 0)
    m_pair = m_present[:, None] & m_present[None, :]
    m_diagonal = o[:, None] == o[None, :]
    b_gram = tl.load(p_gram + o[:, None] * K + o[None, :], mask=m_pair, other=0.0).to(tl.float64)
    finite = tl.sum(tl.sum(b_gram * 0.0, axis=1), axis=0) == 0  # else it is NaN
    b_square = tl.sum(tl.where(m_diagonal, b_gram, 0.0), axis=1)
    m_active = b_square > 0
    b_norm = tl.sqrt(tl.where(m_active, b_square, 1.0))
    b_inverse = 1.0 / b_norm
    m_pair = m_active[:, None] & m_active[None, :] & ~m_diagonal
    # One norm after the other: their product could overflow.
    b_cosine = tl.where(m_pair, b_gram * b_inverse[:, None] * b_inverse[None, :], 0.0)
    return b_cosine + m_diagonal.to(tl.float64), b_norm, m_active, m_present, finite


@triton.jit
def _pcgrad_kernel(p_gram, p_order, p_present, p_weight, K: tl.constexpr, TILE: tl.constexpr):
    """All clusters k project at once; row k of b_coefficient is g_k' / ‖g_k‖ written in the unit vectors."""
    o = tl.arange(0, TILE)
    m = o < K
    _cosine, b_norm, m_active, m_present, finite = _unit_gramian(p_gram, p_present, o, K)
    b_inverse = 1.0 / b_norm
    b_coefficient = (o[:, None] == o[None, :]).to(tl.float64)
    for step in range(K - 1):
        b_partner = tl.load(p_order + o * (K - 1) + step, mask=m, other=0).to(tl.int32)
        m_partner = m & (tl.load(p_present + b_partner, mask=m, other=0) != 0)
        b_square = tl.load(p_gram + b_partner * (K + 1), mask=m_partner, other=0.0).to(tl.float64)
        m_partner = m_partner & (b_square > 0)
        m_tile = m_partner[:, None] & m_active[None, :]
        b_row = tl.load(p_gram + b_partner[:, None] * K + o[None, :], mask=m_tile, other=0.0).to(tl.float64)
        b_inverse_partner = 1.0 / tl.sqrt(tl.where(m_partner, b_square, 1.0))
        b_row *= b_inverse_partner[:, None]
        b_product = tl.sum(b_coefficient * (b_row * b_inverse[None, :]), axis=1)
        b_share = tl.where(b_product < 0, b_product, 0.0)
        b_coefficient -= tl.where(o[None, :] == b_partner[:, None], b_share[:, None], 0.0)
    # Multiplied before it is divided, so that a coefficient of 0 stays 0 whatever the norms are.
    b_weight = tl.sum(b_coefficient * b_norm[:, None] / b_norm[None, :], axis=0)
    b_weight = tl.where(m_present, b_weight, 0.0)
    b_weight = tl.where(finite, b_weight, float("nan"))
    tl.store(p_weight + o, b_weight.to(p_weight.dtype.element_ty), mask=m)


@triton.jit
def _solve(b_matrix, b_right, o, K: tl.constexpr):
    """Solve a symmetric positive definite system by Gauss-Jordan elimination (no pivoting needed)."""
    for c in range(K):
        m_row = (o == c)[:, None]
        m_column = (o == c)[None, :]
        b_pivot_row = tl.sum(tl.where(m_row, b_matrix, 0.0), axis=0)
        pivot = tl.sum(tl.where(o == c, b_pivot_row, 0.0), axis=0)
        b_factor = tl.sum(tl.where(m_column, b_matrix, 0.0), axis=1) / pivot
        b_factor = tl.where(o == c, 0.0, b_factor)
        right = tl.sum(tl.where(o == c, b_right, 0.0), axis=0)
        b_matrix -= b_factor[:, None] * b_pivot_row[None, :]
        b_right -= b_factor * right
    b_diagonal = tl.sum(tl.where(o[:, None] == o[None, :], b_matrix, 0.0), axis=1)
    return b_right / b_diagonal


@triton.jit
def _nash_kernel(
    p_gram,
    p_present,
    p_weight,
    DELTA: tl.constexpr,
    CONVERGED: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    NEWTON_STEPS: tl.constexpr,
    LINE_SEARCH_STEPS: tl.constexpr,
):
    """Damped Newton on ½ βᵀCβ − Σ log β + (n/4) max(0, δ|β|²/n − 1)²; see ops.nash_weights for the derivation."""
    o = tl.arange(0, TILE)
    m = o < K
    m_diagonal = o[:, None] == o[None, :]
    b_matrix, b_norm, m_active, _present, finite = _unit_gramian(p_gram, p_present, o, K)
    b_one = tl.where(m_active, 1.0, 0.0).to(tl.float64)
    n = tl.maximum(tl.sum(b_one, axis=0), 1.0)
    b_start = tl.sum(b_matrix * b_one[None, :], axis=1)
    b_beta = tl.where(m_active, tl.sqrt(n / tl.maximum(tl.sum(b_start * b_one, axis=0), n * DELTA)), 1.0)
    step_count = 0
    while step_count < NEWTON_STEPS:
        b_counted = b_beta * b_one
        square = DELTA / n * tl.sum(b_counted * b_counted, axis=0)
        ridge = DELTA * tl.maximum(square - 1.0, 0.0)
        b_image = tl.sum(b_matrix * b_beta[None, :], axis=1)
        b_gradient = b_image + ridge * b_counted - 1.0 / b_beta
        b_diagonal = 1.0 / (b_beta * b_beta) + ridge
        b_hessian = b_matrix + tl.where(m_diagonal, b_diagonal[None, :], 0.0)
        rank_one = tl.where(ridge > 0, 2.0 * DELTA * DELTA / n, 0.0)
        b_hessian += (rank_one * b_counted)[:, None] * b_counted[None, :]
        b_step = -_solve(b_hessian, b_gradient, o, K)
        b_step = tl.where(m_active, b_step, 0.0)
        descent = -tl.sum(b_gradient * b_step, axis=0)  # not positive where only rounding is left
        if descent > CONVERGED * CONVERGED:
            slope = tl.sum(b_image * b_step, axis=0)
            curvature = tl.sum(tl.sum(b_matrix * b_step[None, :], axis=1) * b_step, axis=0)
            mixed = DELTA / n * tl.sum(b_counted * b_step, axis=0)
            bend = DELTA / n * tl.sum(b_step * b_step, axis=0)
            b_ratio = b_step / b_beta
            m_falling = b_ratio < 0
            limit = tl.min(
                tl.where(m_falling, -1.0 / tl.where(m_falling, b_ratio, -1.0), float("inf")), axis=0
            )
            length = 1.0 / (1.0 + tl.sqrt(descent))
            for _ in range(LINE_SEARCH_STEPS):
                b_slack = b_ratio / (1.0 + length * b_ratio)
                excess = tl.maximum(square + length * (2.0 * mixed + length * bend) - 1.0, 0.0)
                growth = mixed + length * bend
                first = slope + length * curvature - tl.sum(b_slack, axis=0) + n * excess * growth
                second = curvature + tl.sum(b_slack * b_slack, axis=0) + n * excess * bend
                second += tl.where(excess > 0, 2.0 * n * growth * growth, 0.0)
                tried = length - first / second
                tried = tl.where(
                    tried <= 0, length / 2, tl.where(tried >= limit, (length + limit) / 2, tried)
                )
                length = tl.where(tl.abs(tried) < float("inf"), tried, length)
            b_beta += length * b_step
            step_count += 1
        else:
            b_beta += tl.where(descent > 0, b_step, 0.0)
            step_count = NEWTON_STEPS
    # Here, so that the loop has the registers to itself.
    largest = tl.max(tl.where(m_active, b_norm, 0.0), axis=0)
    b_relative = tl.where(m_active, b_norm / largest, 0.0)
    b_scaled = b_matrix * b_relative[None, :]
    frobenius = tl.sqrt(tl.sum(tl.sum(b_scaled * b_scaled, axis=1) * b_relative * b_relative, axis=0))
    b_weight = tl.where(m_active, b_beta * tl.sqrt(frobenius) * (largest / b_norm), 0.0)
    b_weight = tl.where(finite, b_weight, float("nan"))
    tl.store(p_weight + o, b_weight.to(p_weight.dtype.element_ty), mask=m)
