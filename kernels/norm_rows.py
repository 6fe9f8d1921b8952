"""The backward of normalisation over rows, with the gradients of weight and bias of clusters, in one pass.

The rows of a cluster are divided into shares, as for the sums in `clusters`: a program goes over one share and
keeps the sums of its columns in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .clusters import _share_of_cluster


@triton.jit
def _norm_rows_backward_kernel(
    p_grad,
    p_x,
    p_mean,
    p_rstd,
    p_weight,
    p_offset,
    p_by_x,
    p_by_weight,
    p_by_bias,
    num_rows,
    size,
    stride_weight,
    stride_bias,
    stride_share,
    ADD_WEIGHT: tl.constexpr,
    ADD_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ∂x = r (w g − ⟨w g⟩ − z ⟨w g z⟩) of one share of a cluster's rows, and its Σ g z and Σ g.

    `stride_weight` and `stride_bias` lead from one cluster to the next, `stride_share` from one share to the next.
    """
    cluster, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    begin, rows = _share_of_cluster(p_offset, num_rows, cluster, share, tl.num_programs(1), ROWS)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < size
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_column, mask=m_column, other=0.0).to(ACCUMULATE)[None, :]
    b_by_weight = tl.zeros([ROWS, BLOCK], dtype=ACCUMULATE)
    b_by_bias = tl.zeros([ROWS, BLOCK], dtype=ACCUMULATE)
    for row in range(0, rows, ROWS):
        o_row = row + tl.arange(0, ROWS)
        m_row = o_row < rows
        m_tile = m_row[:, None] & m_column[None, :]
        o_element = (begin + o_row)[:, None] * size + o_column[None, :]
        b_slope = tl.load(p_grad + o_element, mask=m_tile, other=0.0).to(ACCUMULATE)
        b_normal = tl.load(p_x + o_element, mask=m_tile, other=0.0).to(ACCUMULATE)
        b_rstd = tl.load(p_rstd + begin + o_row, mask=m_row, other=0.0).to(ACCUMULATE)[:, None]
        if p_mean is not None:
            b_normal -= tl.load(p_mean + begin + o_row, mask=m_row, other=0.0).to(ACCUMULATE)[:, None]
        b_normal *= b_rstd
        if p_by_weight is not None:
            b_by_weight += b_slope * b_normal
        if p_by_bias is not None:
            b_by_bias += b_slope
        if p_weight is not None:
            b_slope *= b_weight
        b_by_x = b_slope - b_normal * (tl.sum(b_slope * b_normal, axis=1) / size)[:, None]
        if p_mean is not None:
            b_by_x -= (tl.sum(b_slope, axis=1) / size)[:, None]
        tl.store(p_by_x + o_element, (b_by_x * b_rstd).to(p_by_x.dtype.element_ty), mask=m_tile)

    if p_by_weight is not None:
        _write_sum(
            p_by_weight + share * stride_share + cluster * stride_weight, b_by_weight, size, ADD_WEIGHT
        )
    if p_by_bias is not None:
        _write_sum(p_by_bias + share * stride_share + cluster * stride_bias, b_by_bias, size, ADD_BIAS)


@triton.jit
def _write_sum(p_out, b_tile, size, ADD: tl.constexpr):
    """Put the sum of a tile's rows, or add it, to `size` elements."""
    o_column = tl.arange(0, b_tile.shape[1])
    m_column = o_column < size
    b_sum = tl.sum(b_tile, axis=0)
    if ADD:
        b_sum += tl.load(p_out + o_column, mask=m_column, other=0.0).to(b_sum.dtype)
    tl.store(p_out + o_column, b_sum.to(p_out.dtype.element_ty), mask=m_column)
