"""Eigenvalues and eigenvectors of a small symmetric matrix, in one program: it lives in registers, in float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _partners(o, turn, TURNS: tl.constexpr, K: tl.constexpr):
    """Whom everyone of K meets in a turn of a round robin; itself where there is nobody."""
    b_partner = (turn + 2 * TURNS - o) % TURNS
    if K % 2 == 0:  # the last one stays where it is, and meets who would meet itself
        left_over = tl.where(turn % 2 == 0, turn, turn + TURNS) // 2
        b_partner = tl.where(b_partner == o, K - 1, b_partner)
        b_partner = tl.where(o == K - 1, left_over, b_partner)
    return tl.where(o < K, b_partner, o)


@triton.jit
def _eigh_kernel(
    p_matrix,
    p_value,
    p_vector,
    K: tl.constexpr,
    TILE: tl.constexpr,
    SWEEPS: tl.constexpr,
    CONVERGED: tl.constexpr,
):
    """Jacobi's method: rotations of disjoint pairs of rows and columns, K // 2 at a time, make A diagonal.

    Values come in ascending order, vector i in column i of V. Source: Golub and Van Loan, "Matrix Computations",
    section 8.5, the parallel ordering of 8.5.6.
    """
    TURNS: tl.constexpr = K - 1 + K % 2
    o = tl.arange(0, TILE)
    m = o < K
    m_tile = m[:, None] & m[None, :]
    m_diagonal = o[:, None] == o[None, :]
    o_tile = o[:, None] * K + o[None, :]
    b_matrix = tl.load(p_matrix + o_tile, mask=m_tile, other=0.0).to(tl.float64)
    b_vector = m_diagonal.to(tl.float64)
    total = tl.sum(tl.sum(b_matrix * b_matrix, axis=1), axis=0)
    sweep = 0
    while sweep < SWEEPS:
        for turn in range(TURNS):
            b_partner = _partners(o, turn, TURNS, K)
            m_partner = o[None, :] == b_partner[:, None]
            b_diagonal = tl.sum(tl.where(m_diagonal, b_matrix, 0.0), axis=1)
            b_other = tl.sum(tl.where(m_partner, b_diagonal[None, :], 0.0), axis=1)
            b_outside = tl.sum(tl.where(m_partner, b_matrix, 0.0), axis=1)
            # The mean of both triangles: the two of a pair must find one and the same angle.
            b_outside += tl.sum(tl.where(m_partner, b_outside[None, :], 0.0), axis=1)
            m_turned = (b_outside != 0) & (b_partner != o)
            b_ratio = (b_other - b_diagonal) / tl.where(m_turned, b_outside, 1.0)
            m_positive = (b_ratio > 0) | ((b_ratio == 0) & (o < b_partner))
            b_tangent = 1.0 / (tl.abs(b_ratio) + tl.sqrt(1.0 + b_ratio * b_ratio))
            b_tangent = tl.where(m_turned, tl.where(m_positive, b_tangent, -b_tangent), 0.0)
            b_cosine = 1.0 / tl.sqrt(1.0 + b_tangent * b_tangent)
            b_sine = b_cosine * b_tangent
            o_row = tl.broadcast_to(b_partner[:, None], [TILE, TILE])
            o_column = tl.broadcast_to(b_partner[None, :], [TILE, TILE])
            b_swapped = tl.gather(b_matrix, o_row, axis=0)
            b_matrix = b_matrix * b_cosine[:, None] - b_swapped * b_sine[:, None]
            b_swapped = tl.gather(b_matrix, o_column, axis=1)
            b_matrix = b_matrix * b_cosine[None, :] - b_swapped * b_sine[None, :]
            b_swapped = tl.gather(b_vector, o_column, axis=1)
            b_vector = b_vector * b_cosine[None, :] - b_swapped * b_sine[None, :]
        b_square = tl.where(m_diagonal, 0.0, b_matrix * b_matrix)
        outside = tl.sum(tl.sum(b_square, axis=1), axis=0)
        sweep = tl.where(outside > CONVERGED * CONVERGED * total, sweep + 1, SWEEPS)
    b_value = tl.sum(tl.where(m_diagonal, b_matrix, 0.0), axis=1)
    b_same = tl.sum(tl.where(m_diagonal, b_matrix, 0.0), axis=0)  # along the other dimension
    m_before = (b_value[:, None] < b_same[None, :]) | (
        (b_value[:, None] == b_same[None, :]) & (o[:, None] < o[None, :])
    )
    o_rank = tl.sum((m_before & m[:, None]).to(tl.int32), axis=0)
    tl.store(p_value + o_rank, b_same, mask=m)
    tl.store(p_vector + o[:, None] * K + o_rank[None, :], b_vector, mask=m_tile)
