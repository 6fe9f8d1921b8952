"""One update direction from weighted rows, in one piece or in parts, and its squared norm."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import ALIGNMENT, find_rows


@triton.jit
def _combine_kernel(
    p_rows,
    p_record,
    p_part,
    p_weight,
    p_out,
    p_square,
    size,
    stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out = (ADD ? out : 0) + Σ_k weight[k] · row_k over one block of columns.

    In parts, the records say where the outputs are and whether to add. square[program] is the squared norm of what
    was written, after rounding.
    """
    program = tl.program_id(0).to(tl.int64)
    p_rows, stride, size, block, p_record = find_rows(
        p_rows, p_record, p_part, stride, size, program, DTYPE, ALIGNED
    )
    o_column = block * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < size
    m_before = m_column
    if p_record is not None:
        p_out = tl.load(p_record + 4).to(tl.pointer_type(OUT_DTYPE))
        if ALIGNED:
            p_out = tl.multiple_of(p_out, ALIGNMENT)
        m_before = m_column & (tl.load(p_record + 5) != 0)
    if ADD:
        b_sum = tl.load(p_out + o_column, mask=m_before, other=0.0).to(ACCUMULATE)
    else:
        b_sum = tl.zeros([BLOCK], dtype=ACCUMULATE)
    for k in tl.static_range(K):
        b_row = tl.load(p_rows + tl.full([], k, tl.int64) * stride + o_column, mask=m_column, other=0.0).to(
            ACCUMULATE
        )
        b_sum += b_row * tl.load(p_weight + k).to(ACCUMULATE)
    if OUT_DTYPE.primitive_bitwidth == 16:  # there is no single step from float64
        b_sum = b_sum.to(tl.float32)
    b_out = b_sum.to(OUT_DTYPE)
    tl.store(p_out + o_column, b_out, mask=m_column)
    # An infinite weight makes NaN of the zeros beyond the end; they do not count.
    b_written = tl.where(m_column, b_out.to(ACCUMULATE), 0.0).to(tl.float64)
    tl.store(p_square + program, tl.sum(b_written * b_written, axis=0))
