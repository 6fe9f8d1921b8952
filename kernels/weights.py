"""Weights from the Gramian, each in one program: the K×K problem lives in registers, in float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pcgrad_kernel(p_gram, p_order, p_present, p_weight, K: tl.constexpr, TILE: tl.constexpr):
    """All clusters k project at once; row k of b_coefficient is g_k' written in the original gradients."""
    o = tl.arange(0, TILE)
    m = o < K
    b_coefficient = (o[:, None] == o[None, :]).to(tl.float64)
    for step in range(K - 1):
        b_partner = tl.load(p_order + o * (K - 1) + step, mask=m, other=0).to(tl.int32)
        m_tile = m[:, None] & m[None, :]
        b_row = tl.load(p_gram + b_partner[:, None] * K + o[None, :], mask=m_tile, other=0.0).to(tl.float64)
        b_norm = tl.load(p_gram + b_partner * (K + 1), mask=m, other=0.0).to(tl.float64)
        b_product = tl.sum(b_coefficient * b_row, axis=1)
        m_conflict = (b_product < 0) & (b_norm > 0)
        b_share = tl.where(m_conflict, b_product / tl.where(m_conflict, b_norm, 1.0), 0.0)
        b_coefficient -= tl.where(o[None, :] == b_partner[:, None], b_share[:, None], 0.0)
    m_present = tl.load(p_present + o, mask=m, other=0) != 0
    b_weight = tl.sum(tl.where(m_present[:, None], b_coefficient, 0.0), axis=0)
    b_weight = tl.where(m_present, b_weight, 0.0)
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
    EPS: tl.constexpr,
    CONVERGED: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    NEWTON_STEPS: tl.constexpr,
    LINE_SEARCH_STEPS: tl.constexpr,
):
    """Damped Newton on ½ βᵀMβ − Σ log β with an exact line search; see ops.nash_weights for the derivation."""
    o = tl.arange(0, TILE)
    m = o < K
    m_diagonal = o[:, None] == o[None, :]
    m_tile = m[:, None] & m[None, :]
    b_gram = tl.load(p_gram + o[:, None] * K + o[None, :], mask=m_tile, other=0.0).to(tl.float64)
    m_present = m & (tl.load(p_present + o, mask=m, other=0) != 0)
    b_square = tl.sum(tl.where(m_diagonal, b_gram, 0.0), axis=1)
    finite = tl.sum(tl.where(m_present & ~(tl.abs(b_square) < float("inf")), 1, 0), axis=0) == 0
    m_active = m_present & (b_square > 0)
    b_gram = tl.where(m_active[:, None] & m_active[None, :], b_gram, 0.0)
    frobenius = tl.sqrt(tl.sum(tl.sum(b_gram * b_gram, axis=1), axis=0))
    b_inverse_norm = 1.0 / tl.sqrt(tl.where(m_active, b_square, 1.0))
    b_matrix = b_gram * b_inverse_norm[:, None] * b_inverse_norm[None, :]
    b_matrix = tl.where(m_diagonal, 1.0 + K * EPS, b_matrix)

    b_one = tl.where(m_active, 1.0, 0.0).to(tl.float64)
    b_start = tl.sum(b_matrix * b_one[None, :], axis=1)
    curvature = tl.maximum(tl.sum(b_start * b_one, axis=0), 2.2250738585072014e-308)
    b_beta = tl.where(m_active, tl.sqrt(tl.sum(b_one, axis=0) / curvature), 1.0)
    step_count = 0
    while step_count < NEWTON_STEPS:
        b_product = tl.sum(b_matrix * b_beta[None, :], axis=1)
        b_gradient = b_product - 1.0 / b_beta
        b_hessian = b_matrix + tl.where(m_diagonal, (1.0 / (b_beta * b_beta))[None, :], 0.0)
        b_step = -_solve(b_hessian, b_gradient, o, K)
        b_step = tl.where(m, b_step, 0.0)
        decrement = tl.sqrt(tl.maximum(-tl.sum(tl.where(m, b_gradient, 0.0) * b_step, axis=0), 0.0))
        if decrement > CONVERGED:
            slope = tl.sum(b_product * b_step, axis=0)
            bend = tl.sum(tl.sum(b_matrix * b_step[None, :], axis=1) * b_step, axis=0)
            b_ratio = b_step / b_beta
            m_falling = b_ratio < 0
            limit = tl.min(
                tl.where(m_falling, -1.0 / tl.where(m_falling, b_ratio, -1.0), float("inf")), axis=0
            )
            length = 1.0 / (1.0 + decrement)
            for _ in range(LINE_SEARCH_STEPS):
                b_slack = b_ratio / (1.0 + length * b_ratio)
                slack = tl.sum(b_slack, axis=0)
                squares = tl.sum(b_slack * b_slack, axis=0)
                tried = length - (slope + length * bend - slack) / (bend + squares)
                tried = tl.where(
                    tried <= 0, length / 2, tl.where(tried >= limit, (length + limit) / 2, tried)
                )
                length = tl.where(tl.abs(tried) < float("inf"), tried, length)
            b_beta += length * b_step
            step_count += 1
        else:
            step_count = NEWTON_STEPS
    b_weight = tl.where(m_active, b_beta * b_inverse_norm * tl.sqrt(frobenius), 0.0)
    b_weight = tl.where(finite, b_weight, float("nan"))
    tl.store(p_weight + o, b_weight.to(p_weight.dtype.element_ty), mask=m)
