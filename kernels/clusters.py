"""Sums over the contiguous rows of clusters: weight gradients (a product of tiles) and plain sums.

Where clusters and tiles are too few for a GPU, every cluster's rows are divided into shares, each with a result of
its own, and a second kernel adds those up in order: no atomics, so that the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _share_of_cluster(p_offset, num_rows, cluster, share, shares, BLOCK: tl.constexpr):
    """Return first row and number of rows of one share of a cluster.

    Nobody has checked offsets that live on the device: whatever they are, the rows lie within the tensor.
    """
    low = tl.minimum(tl.maximum(tl.load(p_offset + cluster), 0), num_rows)
    high = tl.minimum(tl.maximum(tl.load(p_offset + cluster + 1), low), num_rows)
    size = tl.cdiv(tl.cdiv(high - low, shares), BLOCK) * BLOCK
    begin = tl.minimum(low + share * size, high)
    return begin, (tl.minimum(begin + size, high) - begin).to(tl.int32)


@triton.jit
def _cluster_wgrad_kernel(
    p_grad,
    p_x,
    p_offset,
    p_out,
    num_rows,
    num_outputs,
    num_inputs,
    stride_grad,
    stride_x,
    stride_cluster,
    stride_share,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out[share, cluster] = grad_rowsᵀ · x_rows: one tile of outputs × inputs over the rows of one share.

    PRECISION is that of float32 products, "ieee" or "tf32"; those of shorter numbers are exact in any case.
    """
    tiles = tl.cdiv(num_inputs, BLOCK_I)
    o_out = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    o_in = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    m_out, m_in = o_out < num_outputs, o_in < num_inputs
    cluster, share = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin, rows = _share_of_cluster(p_offset, num_rows, cluster, share, tl.num_programs(2), BLOCK_N)

    o_row = tl.arange(0, BLOCK_N)
    p_grad += o_out[:, None] + (begin + o_row)[None, :] * stride_grad
    p_x += (begin + o_row)[:, None] * stride_x + o_in[None, :]
    b_sum = tl.zeros([BLOCK_O, BLOCK_I], dtype=ACCUMULATE)
    for row in range(0, rows, BLOCK_N):
        m_row = row + o_row < rows
        b_grad = tl.load(p_grad, mask=m_out[:, None] & m_row[None, :], other=0.0)
        b_x = tl.load(p_x, mask=m_row[:, None] & m_in[None, :], other=0.0)
        b_sum = tl.dot(b_grad, b_x, b_sum, input_precision=PRECISION, out_dtype=ACCUMULATE)
        p_grad += tl.full([], BLOCK_N, tl.int64) * stride_grad
        p_x += tl.full([], BLOCK_N, tl.int64) * stride_x

    p_out += share * stride_share + cluster * stride_cluster
    p_out += o_out.to(tl.int64)[:, None] * num_inputs + o_in[None, :]
    m_tile = m_out[:, None] & m_in[None, :]
    if ADD:
        b_sum += tl.load(p_out, mask=m_tile, other=0.0).to(ACCUMULATE)
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def _cluster_sum_kernel(
    p_value,
    p_offset,
    p_out,
    num_rows,
    size,
    stride_value,
    stride_cluster,
    stride_share,
    ADD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[share, cluster] = Σ rows: one block of columns over the rows of one share."""
    o_column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < size
    cluster, share = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin, rows = _share_of_cluster(p_offset, num_rows, cluster, share, tl.num_programs(2), ROWS)

    o_row = tl.arange(0, ROWS)
    p_value += (begin + o_row)[:, None] * stride_value + o_column[None, :]
    b_sum = tl.zeros([ROWS, BLOCK], dtype=ACCUMULATE)
    for row in range(0, rows, ROWS):
        m_tile = (row + o_row < rows)[:, None] & m_column[None, :]
        b_sum += tl.load(p_value, mask=m_tile, other=0.0).to(ACCUMULATE)
        p_value += tl.full([], ROWS, tl.int64) * stride_value

    b_total = tl.sum(b_sum, axis=0)
    p_out += share * stride_share + cluster * stride_cluster + o_column
    if ADD:
        b_total += tl.load(p_out, mask=m_column, other=0.0).to(ACCUMULATE)
    tl.store(p_out, b_total.to(p_out.dtype.element_ty), mask=m_column)


@triton.jit
def _add_shares_kernel(p_share, p_out, shares, size, stride_cluster, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out[cluster] = Σ over the shares of share[·, cluster], one block of a cluster's elements."""
    o_element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_element = o_element < size
    cluster = tl.program_id(1).to(tl.int64)
    p_share += cluster * size + o_element
    b_sum = tl.zeros([BLOCK], dtype=p_share.dtype.element_ty)
    for _ in range(shares):
        b_sum += tl.load(p_share, mask=m_element, other=0.0)
        p_share += tl.num_programs(1).to(tl.int64) * size
    p_out += cluster * stride_cluster + o_element
    if ADD:
        b_sum += tl.load(p_out, mask=m_element, other=0.0).to(b_sum.dtype)
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty), mask=m_element)
