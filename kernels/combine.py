"""One update direction from weighted rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _combine_kernel(
    p_rows, p_weight, p_out, size, stride, K: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr
):
    """out = Σ_k weight[k] · row_k over one block of columns."""
    o_column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < size
    b_sum = tl.zeros([BLOCK], dtype=ACCUMULATE)
    for k in tl.static_range(K):
        b_row = tl.load(p_rows + tl.full([], k, tl.int64) * stride + o_column, mask=m_column, other=0.0).to(
            ACCUMULATE
        )
        b_sum += b_row * tl.load(p_weight + k).to(ACCUMULATE)
    tl.store(p_out + o_column, b_sum.to(p_out.dtype.element_ty), mask=m_column)
