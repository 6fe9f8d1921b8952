"""The Gramian of a tall set of rows: one pass over J, partial Gramians per column block."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gram_vector_kernel(
    p_rows, p_partial, size, stride, K: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr
):
    """partial[block, i, j] = ⟨g_i, g_j⟩ over one block of columns, for few clusters.

    Rows that were read for an earlier pair come from the L1 cache, so that J leaves the memory once.
    """
    block = tl.program_id(0).to(tl.int64)
    o_column = block * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < size
    p_out = p_partial + block * K * K
    for i in tl.static_range(K):
        b_i = tl.load(p_rows + tl.full([], i, tl.int64) * stride + o_column, mask=m_column, other=0.0).to(
            ACCUMULATE
        )
        for j in tl.static_range(i, K):
            b_j = tl.load(p_rows + tl.full([], j, tl.int64) * stride + o_column, mask=m_column, other=0.0).to(
                ACCUMULATE
            )
            product = tl.sum(b_i * b_j, axis=0)
            tl.store(p_out + i * K + j, product)
            tl.store(p_out + j * K + i, product)


@triton.jit
def _gram_tile_kernel(
    p_rows,
    p_partial,
    size,
    stride,
    blocks,
    K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[program] = Gramian of one run of column blocks, for many clusters, as a product of tiles.

    The sums are float32. So are the products of float32 rows (PRECISION "ieee"): TF32 keeps three digits, and the
    weights need more. A bfloat16 or float16 fits into TF32 without loss, so their products are exact with "tf32".
    """
    program = tl.program_id(0).to(tl.int64)
    o_row = tl.arange(0, TILE).to(tl.int64)
    m_row = o_row < K
    b_gram = tl.zeros([TILE, TILE], dtype=tl.float32)
    for block in range(blocks):
        o_column = (program * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        m_tile = m_row[:, None] & (o_column < size)[None, :]
        b_rows = tl.load(p_rows + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0)
        b_rows = b_rows.to(tl.float32)
        b_gram += tl.dot(b_rows, tl.trans(b_rows), input_precision=PRECISION)
    p_out = p_partial + program * K * K + o_row[:, None] * K + o_row[None, :]
    tl.store(p_out, b_gram, mask=m_row[:, None] & m_row[None, :])
