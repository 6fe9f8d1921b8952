"""The Gramian of a tall set of rows, in one piece or in parts: one pass over J."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import find_rows


@triton.jit
def _gram_vector_kernel(
    p_rows,
    p_record,
    p_part,
    p_partial,
    size,
    stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """partial[i, j, program] = ⟨g_i, g_j⟩, i ≤ j, over one block of columns, for few clusters.

    Rows that were read for an earlier pair come from the L1 cache, so that J leaves the memory once.
    """
    program = tl.program_id(0).to(tl.int64)
    programs, p_out = tl.num_programs(0), p_partial + program
    p_rows, stride, size, block, _ = find_rows(
        p_rows, p_record, p_part, stride, size, program, DTYPE, ALIGNED
    )
    o_column = block * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < size
    for i in tl.static_range(K):
        b_i = tl.load(p_rows + tl.full([], i, tl.int64) * stride + o_column, mask=m_column, other=0.0).to(
            ACCUMULATE
        )
        for j in tl.static_range(i, K):
            b_j = tl.load(p_rows + tl.full([], j, tl.int64) * stride + o_column, mask=m_column, other=0.0).to(
                ACCUMULATE
            )
            tl.store(p_out, tl.sum(b_i * b_j, axis=0))
            p_out += programs
        p_out += tl.full([], i + 1, tl.int64) * programs  # on to the diagonal of the next row


@triton.jit
def _gram_tile_kernel(
    p_rows,
    p_record,
    p_part,
    p_partial,
    size,
    stride,
    run,
    K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """partial[:, :, program] = Gramian of a run of column blocks, for many clusters, as products of tiles.

    Products of float32 rows are float32 (PRECISION "ieee"): TF32 keeps three digits, and the weights need more.
    A bfloat16 or float16 fits into TF32 without loss, so their products are exact with "tf32". Sums over blocks in
    float64 are of rows that a power of two, their own in every block, has brought to 1 to 2 before they are
    multiplied: no product overflows, and none vanishes that counts beside the row's largest number.
    """
    program = tl.program_id(0).to(tl.int64)
    programs, p_out = tl.num_programs(0), p_partial + program
    p_rows, stride, size, place, _ = find_rows(
        p_rows, p_record, p_part, stride, size, program, DTYPE, ALIGNED
    )
    o_row = tl.arange(0, TILE).to(tl.int64)
    m_row = o_row < K
    b_gram = tl.zeros([TILE, TILE], dtype=ACCUMULATE)
    begin = place * run * BLOCK
    for column in range(begin, tl.minimum(begin + run * BLOCK, size), BLOCK):
        o_column = column + tl.arange(0, BLOCK)
        m_tile = m_row[:, None] & (o_column < size)[None, :]
        b_rows = tl.load(p_rows + o_row[:, None] * stride + o_column[None, :], mask=m_tile, other=0.0)
        b_rows = b_rows.to(tl.float32)
        if tl.float64 == ACCUMULATE:
            # The exponent alone of the largest number; at the ends of the range the power's inverse would be none.
            b_exponent = tl.max(tl.abs(b_rows), axis=1).to(tl.int32, bitcast=True) >> 23
            b_exponent = tl.minimum(tl.maximum(b_exponent, 1), 253)
            b_power = (b_exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
            b_rows *= ((254 - b_exponent) << 23).to(tl.float32, bitcast=True)[:, None]
            b_block = tl.dot(b_rows, tl.trans(b_rows), input_precision=PRECISION).to(tl.float64)
            b_gram += b_block * b_power[:, None] * b_power[None, :]
        else:
            b_gram += tl.dot(b_rows, tl.trans(b_rows), input_precision=PRECISION)
    p_out += (o_row[:, None] * K + o_row[None, :]) * programs
    tl.store(p_out, b_gram, mask=m_row[:, None] & m_row[None, :])
