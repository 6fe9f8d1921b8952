"""The backward of group normalisation: one program per group of a sample."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_slope_and_normal(p_grad, p_x, o_element, m_tile, mean, rstd):
    """Load g and z = (x − μ) r, one tile of channels × positions, in float32."""
    b_grad = tl.load(p_grad + o_element, mask=m_tile, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + o_element, mask=m_tile, other=0.0).to(tl.float32)
    return b_grad, (b_x - mean) * rstd


@triton.jit
def _group_norm_backward_kernel(
    p_grad,
    p_x,
    p_mean,
    p_rstd,
    p_weight,
    p_by_x,
    p_by_weight,
    p_by_bias,
    groups,
    channels,
    size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ∂x = r (w g − ⟨w g⟩ − z ⟨w g z⟩) of one group of `channels` channels, and Σ g z and Σ g of each.

    Without a mean, x was only divided: μ and ⟨w g⟩ are 0 then. The tensors are read twice, first for the sums; a
    group that fits the cache comes from there the second time.
    """
    program = tl.program_id(0).to(tl.int64)
    # Made of tensors: Triton takes an argument that is 1 for a constant, whose products have 32 bits.
    elements = tl.full([], 1, tl.int64) * channels * size
    mean = tl.full([], 0.0, tl.float32)
    if p_mean is not None:
        mean = tl.load(p_mean + program).to(tl.float32)
    rstd = tl.load(p_rstd + program).to(tl.float32)
    p_grad += program * elements
    p_x += program * elements
    p_by_x += program * elements
    p_by_weight += program * channels
    p_by_bias += program * channels
    if p_weight is not None:
        p_weight += program % groups * channels
    o_row = tl.arange(0, ROWS)
    o_position = tl.arange(0, BLOCK)

    slope = tl.full([], 0.0, tl.float32)  # Σ w g and Σ w g z of the group
    along = tl.full([], 0.0, tl.float32)
    for channel in range(0, channels, ROWS):
        o_channel = channel + o_row
        m_channel = o_channel < channels
        b_slope = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        b_along = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, size, BLOCK):
            m_tile = m_channel[:, None] & (start + o_position < size)[None, :]
            o_element = o_channel.to(tl.int64)[:, None] * size + (start + o_position)[None, :]
            b_grad, b_normal = _load_slope_and_normal(p_grad, p_x, o_element, m_tile, mean, rstd)
            b_slope += b_grad
            b_along += b_grad * b_normal
        b_by_bias = tl.sum(b_slope, axis=1)
        b_by_weight = tl.sum(b_along, axis=1)
        tl.store(p_by_bias + o_channel, b_by_bias, mask=m_channel)
        tl.store(p_by_weight + o_channel, b_by_weight, mask=m_channel)
        if p_weight is not None:
            b_weight = tl.load(p_weight + o_channel, mask=m_channel, other=0.0).to(tl.float32)
            b_by_bias *= b_weight
            b_by_weight *= b_weight
        if p_mean is not None:
            slope += tl.sum(b_by_bias, axis=0)
        along += tl.sum(b_by_weight, axis=0)
    slope /= elements.to(tl.float32)
    along /= elements.to(tl.float32)

    for channel in range(0, channels, ROWS):
        o_channel = channel + o_row
        m_channel = o_channel < channels
        if p_weight is not None:
            b_weight = tl.load(p_weight + o_channel, mask=m_channel, other=0.0).to(tl.float32)
        for start in range(0, size, BLOCK):
            m_tile = m_channel[:, None] & (start + o_position < size)[None, :]
            o_element = o_channel.to(tl.int64)[:, None] * size + (start + o_position)[None, :]
            b_grad, b_normal = _load_slope_and_normal(p_grad, p_x, o_element, m_tile, mean, rstd)
            if p_weight is not None:
                b_grad *= b_weight[:, None]
            b_by_x = (b_grad - slope - b_normal * along) * rstd
            tl.store(p_by_x + o_element, b_by_x.to(p_by_x.dtype.element_ty), mask=m_tile)
