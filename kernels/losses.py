"""Losses of every sample: partial sums, their means by sample and by cluster, the gradient by the prediction."""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import load_noise


@triton.jit
def _load_error(
    p_pred,
    p_first,
    p_second,
    p_mix,
    sample,
    chunk,
    batch,
    size,
    MIXED: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Load pred − first, or pred − (mix[0, sample] · first + mix[1, sample] · second): one chunk of a sample.

    SEEDED: the last of them is the seed of the noise that is meant.
    """
    o_element = chunk * BLOCK + tl.arange(0, BLOCK)
    m_element = o_element < size
    o_flat = sample * size + o_element
    b_pred = tl.load(p_pred + o_flat, mask=m_element, other=0.0).to(ACCUMULATE)
    if SEEDED and not MIXED:
        b_target = load_noise(p_first, sample, chunk * BLOCK, BLOCK).to(ACCUMULATE)
    else:
        b_target = tl.load(p_first + o_flat, mask=m_element, other=0.0).to(ACCUMULATE)
    if MIXED:
        if SEEDED:
            b_second = load_noise(p_second, sample, chunk * BLOCK, BLOCK).to(ACCUMULATE)
        else:
            b_second = tl.load(p_second + o_flat, mask=m_element, other=0.0).to(ACCUMULATE)
        b_target = b_target * tl.load(p_mix + sample).to(ACCUMULATE)
        b_target += b_second * tl.load(p_mix + batch + sample).to(ACCUMULATE)
    # Beyond the end the noise goes on; it must not count.
    return tl.where(m_element, b_pred - b_target, 0.0), o_flat, m_element


@triton.jit
def _error_sum_kernel(
    p_pred,
    p_first,
    p_second,
    p_mix,
    p_weight,
    p_partial,
    batch,
    size,
    chunks,
    DELTA: tl.constexpr,
    MIXED: tl.constexpr,
    SEEDED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """partial[sample, chunk] = Σ of squared errors, or of Huber losses with DELTA, over one chunk of a sample.

    WHOLE: the chunk is all of the sample, and what is stored is its loss, weight[sample] / size · Σ.
    """
    sample = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    b_error, _, _ = _load_error(
        p_pred, p_first, p_second, p_mix, sample, chunk, batch, size, MIXED, SEEDED, BLOCK, ACCUMULATE
    )
    b_loss = b_error * b_error
    if DELTA is not None:
        b_size = tl.abs(b_error)
        b_loss = tl.where(b_size <= DELTA, 0.5 * b_loss, DELTA * (b_size - 0.5 * DELTA))
    total = tl.sum(b_loss, axis=0)
    if WHOLE:
        total /= size
        if p_weight is not None:
            total *= tl.load(p_weight + sample).to(ACCUMULATE)
    tl.store(p_partial + sample * chunks + chunk, total)


@triton.jit
def _error_backward_kernel(
    p_scale,
    p_pred,
    p_first,
    p_second,
    p_mix,
    p_grad,
    p_by_first,
    batch,
    size,
    chunks,
    DELTA: tl.constexpr,
    MIXED: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """grad = scale[sample] / size · (2 error, or the error clamped to ±DELTA), one chunk of one sample.

    Its negative, the gradient by `first` where nothing is mixed, goes to `p_by_first` if that is given.
    """
    sample = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0).to(tl.int64) % chunks
    b_slope, o_flat, m_element = _load_error(
        p_pred, p_first, p_second, p_mix, sample, chunk, batch, size, MIXED, SEEDED, BLOCK, ACCUMULATE
    )
    if DELTA is None:
        b_slope *= 2
    else:
        # A NaN error must stay one: comparisons with it are false.
        b_slope = tl.where(b_slope > DELTA, DELTA, tl.where(b_slope < -DELTA, -DELTA, b_slope))
    b_grad = b_slope * (tl.load(p_scale + sample).to(ACCUMULATE) / size)
    tl.store(p_grad + o_flat, b_grad.to(p_grad.dtype.element_ty), mask=m_element)
    if p_by_first is not None:
        tl.store(p_by_first + o_flat, (-b_grad).to(p_by_first.dtype.element_ty), mask=m_element)


@triton.jit
def _sample_mean_kernel(
    p_partial, p_weight, p_loss, batch, chunks, size, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """loss[sample] = weight[sample] / size · Σ of the sample's partial sums, in their fixed order."""
    o_sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_sample = o_sample < batch
    b_sum = tl.zeros([BLOCK], dtype=p_partial.dtype.element_ty)
    for chunk in range(chunks):
        b_sum += tl.load(p_partial + o_sample * chunks + chunk, mask=m_sample, other=0.0)
    b_loss = b_sum / size
    if WEIGHTED:
        b_loss *= tl.load(p_weight + o_sample, mask=m_sample, other=0.0).to(b_loss.dtype)
    tl.store(p_loss + o_sample, b_loss, mask=m_sample)


@triton.jit
def _cluster_mean_kernel(p_value, p_cluster, p_mean, p_count, batch, BLOCK: tl.constexpr):
    """One program per cluster: the mean and the number of its samples."""
    cluster = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], dtype=p_mean.dtype.element_ty)
    b_count = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, batch, BLOCK):
        o_sample = start + tl.arange(0, BLOCK)
        m_sample = o_sample < batch
        b_member = tl.load(p_cluster + o_sample, mask=m_sample, other=-1) == cluster
        b_sum += tl.load(p_value + o_sample, mask=b_member, other=0.0).to(b_sum.dtype)
        b_count += b_member.to(tl.int64)
    count = tl.sum(b_count, axis=0)
    tl.store(p_mean + cluster, tl.sum(b_sum, axis=0) / tl.maximum(count, 1).to(b_sum.dtype))
    tl.store(p_count + cluster, count)


@triton.jit
def _uncertainty_kernel(
    p_mean,
    p_count,
    p_log_var,
    p_cluster,
    p_weight,
    p_loss,
    p_slope,
    p_log_var_grad,
    batch,
    k,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: loss = Σ ½ (e^{−u} mean / n + u) over the n present clusters, and its slopes.

    slope[sample] is the one by the sample's squared error, weight · ½ e^{−u} / (n count) of its cluster.
    """
    o_k = tl.arange(0, TILE)
    b_present = tl.load(p_count + o_k, mask=o_k < k, other=0) > 0
    b_mean = tl.load(p_mean + o_k, mask=b_present, other=0.0)
    b_log_var = tl.load(p_log_var + o_k, mask=b_present, other=0.0).to(b_mean.dtype)
    present = tl.maximum(tl.sum(b_present.to(b_mean.dtype), axis=0), 1)
    b_term = tl.where(b_present, 0.5 * tl.exp(-b_log_var) / present * b_mean, 0.0)
    tl.store(p_loss, tl.sum(b_term + 0.5 * b_log_var, axis=0))
    b_grad = tl.where(b_present, 0.5 - b_term, 0.0)
    tl.store(p_log_var_grad + o_k, b_grad.to(p_log_var_grad.dtype.element_ty), mask=o_k < k)
    for start in range(0, batch, BLOCK):
        o_sample = start + tl.arange(0, BLOCK)
        m_sample = o_sample < batch
        b_cluster = tl.load(p_cluster + o_sample, mask=m_sample, other=0)
        b_count = tl.load(p_count + b_cluster, mask=m_sample, other=1).to(b_mean.dtype)
        b_own = tl.load(p_log_var + b_cluster, mask=m_sample, other=0.0).to(b_mean.dtype)
        b_slope = 0.5 * tl.exp(-b_own) / (present * b_count)
        if WEIGHTED:
            b_slope *= tl.load(p_weight + o_sample, mask=m_sample, other=0.0).to(b_mean.dtype)
        tl.store(p_slope + o_sample, b_slope, mask=m_sample)
