"""Counter-based normal noise in the kernel, and the forward process; `ops/philox.py` has the definition."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _uniform(word):
    """Map a word to (0, 1]."""
    return ((word >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _circle(turn):
    """Return cos 2πu and sin 2πu of u in (0, 1], to one unit in the last place of 1.

    The library functions carry a path for huge arguments that needs local memory; here the nearest quarter turn is
    taken off exactly, and short polynomials (those of Cephes' sinf and cosf) do the rest.
    """
    quarters = 4.0 * turn
    nearest = tl.floor(quarters + 0.5)
    x = (quarters - nearest) * 1.5707963267948966
    y = x * x
    sine = x + x * y * (-1.6666654611e-1 + y * (8.3321608736e-3 - y * 1.9515295891e-4))
    cosine = (
        1.0
        - 0.5 * y
        + y * y * (4.166664568298827e-2 + y * (-1.388731625493765e-3 + y * 2.443315711809948e-5))
    )
    quadrant = nearest.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    a = tl.where(odd, sine, cosine)
    b = tl.where(odd, cosine, sine)
    return tl.where((quadrant == 1) | (quadrant == 2), -a, a), tl.where(quadrant >= 2, -b, b)


@triton.jit
def _pair(first, second):
    """Turn two words into two independent normal values (Box-Muller)."""
    length = tl.sqrt(-2.0 * tl.log(_uniform(first)))
    cosine, sine = _circle(_uniform(second))
    return length * cosine, length * sine


@triton.jit
def load_noise(p_seed, sample, start, BLOCK: tl.constexpr):
    """Generate the noise of BLOCK elements of one sample, from element `start` (a multiple of 4) on."""
    seed = tl.load(p_seed).to(tl.uint64)
    key_0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_1 = (seed >> 32).to(tl.uint32)
    a = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    b = tl.zeros_like(a)
    c = tl.zeros_like(a) + sample.to(tl.uint32)
    d = tl.zeros_like(a)
    m_0 = tl.full([], 0xD2511F53, tl.uint32)
    m_1 = tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high_a = tl.umulhi(a, m_0)
        low_a = a * m_0
        high_c = tl.umulhi(c, m_1)
        low_c = c * m_1
        a = high_c ^ b ^ key_0
        b = low_c
        c = high_a ^ d ^ key_1
        d = low_a
        key_0 += tl.full([], 0x9E3779B9, tl.uint32)
        key_1 += tl.full([], 0xBB67AE85, tl.uint32)
    n_0, n_1 = _pair(a, b)
    n_2, n_3 = _pair(c, d)
    return tl.interleave(tl.interleave(n_0, n_2), tl.interleave(n_1, n_3))


@triton.jit
def _add_noise_kernel(
    p_x0,
    p_noise,
    p_alpha,
    p_sigma,
    p_out,
    size,
    chunks,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """out = alpha[sample] · x0 + sigma[sample] · noise, one chunk of one sample."""
    sample = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    o_element = chunk * BLOCK + tl.arange(0, BLOCK)
    m_element = o_element < size
    o_flat = sample * size + o_element
    if SEEDED:
        b_noise = load_noise(p_noise, sample, chunk * BLOCK, BLOCK).to(ACCUMULATE)
    else:
        b_noise = tl.load(p_noise + o_flat, mask=m_element, other=0.0).to(ACCUMULATE)
    b_x0 = tl.load(p_x0 + o_flat, mask=m_element, other=0.0).to(ACCUMULATE)
    b_out = (
        tl.load(p_alpha + sample).to(ACCUMULATE) * b_x0 + tl.load(p_sigma + sample).to(ACCUMULATE) * b_noise
    )
    tl.store(p_out + o_flat, b_out.to(p_out.dtype.element_ty), mask=m_element)


@triton.jit
def _philox_normal_kernel(p_seed, p_out, size, chunks, BLOCK: tl.constexpr):
    """Write out the noise of one chunk of one sample."""
    sample = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    o_element = chunk * BLOCK + tl.arange(0, BLOCK)
    b_noise = load_noise(p_seed, sample, chunk * BLOCK, BLOCK)
    tl.store(p_out + sample * size + o_element, b_noise, mask=o_element < size)
