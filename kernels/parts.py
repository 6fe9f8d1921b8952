"""One launch over many tensors: which rows of which tensor a program works on, and the sum over all programs.

The tensors are those of a Jacobian in parts: K rows each, of any length. A table on the device has one record of
int64 for every part, and a second one names the part of every program. A single part needs neither.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A record: address of the rows, elements from one row to the next, elements of a row, the part's first program,
# address of the output, whether to add to it.
FIELDS = tl.constexpr(6)
# What a row's stride and length must be divisible by, its address in bytes too, to be read in 16-byte pieces.
ALIGNMENT = tl.constexpr(16)


@triton.jit
def find_rows(p_rows, p_record, p_part, stride, size, program, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the rows that this program works on, their stride and length, its place among theirs, the record."""
    if p_record is not None:
        p_record += tl.load(p_part + program).to(tl.int64) * FIELDS
        p_rows = tl.load(p_record).to(tl.pointer_type(DTYPE))
        stride = tl.load(p_record + 1)
        size = tl.load(p_record + 2)
        program -= tl.load(p_record + 3)
        if ALIGNED:  # a promise of the launcher's
            p_rows = tl.multiple_of(p_rows, ALIGNMENT)
            stride = tl.multiple_of(stride, ALIGNMENT)
            size = tl.multiple_of(size, ALIGNMENT)
    return p_rows, stride, size, program, p_record


@triton.jit(do_not_specialize=["programs"])
def _sum_kernel(p_partial, p_sum, programs, K: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """sum[i, j] = sum[j, i] = Σ partial[i, j, :] for i ≤ j < K, in float64; PAIRS of (i, j) to a program."""
    o_pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    row, column = o_pair // K, o_pair % K
    m_pair = (row < K) & (row <= column)
    b_sum = tl.zeros([PAIRS, BLOCK], dtype=tl.float64)
    for begin in range(0, programs, BLOCK):
        o_program = begin + tl.arange(0, BLOCK)
        m_tile = m_pair[:, None] & (o_program < programs)[None, :]
        b_sum += tl.load(p_partial + o_pair[:, None] * programs + o_program[None, :], mask=m_tile, other=0.0)
    b_sum = tl.sum(b_sum, axis=1).to(p_sum.dtype.element_ty)
    tl.store(p_sum + row * K + column, b_sum, mask=m_pair)
    tl.store(p_sum + column * K + row, b_sum, mask=m_pair)
