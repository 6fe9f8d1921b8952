"""The Triton kernels behind the ops: how each is launched, and their registration for CUDA (and ROCm) tensors.

Every launcher has the signature of its op's plain definition. Where a kernel does not cover an input, the launcher
hands it to that definition and the reason is logged once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..kernels import combine as combine_kernels
from ..kernels import gram as gram_kernels
from ..kernels import losses as loss_kernels
from ..kernels import noise as noise_kernels
from ..kernels import settings
from ..kernels import weights as weight_kernels
from ._checks import accumulation_dtype
from ._layout import CHANNELS_LAST, as_matrix, empty_row, in_rows
from ._library import register_kernel, run_plain
from .nash import CONVERGED, LINE_SEARCH_STEPS, NEWTON_STEPS

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _is_seed(noise: Tensor | None) -> bool:
    return noise is not None and not noise.is_floating_point()


def _in_one_order(pred: Tensor, *others: Tensor | None) -> tuple[list[Tensor | None], torch.memory_format]:
    """Bring all tensors into one order in memory, without a copy where they are so already.

    Every order used here keeps a sample's elements together, which is all that the kernels ask for; generated
    noise asks for the row-major one.
    """
    order = torch.contiguous_format
    channels_last = None if any(_is_seed(t) for t in others) else CHANNELS_LAST.get(pred.dim())
    if (
        channels_last is not None
        and not pred.is_contiguous()
        and pred.is_contiguous(memory_format=channels_last)
    ):
        order = channels_last
    tensors = [t if t is None or _is_seed(t) else t.contiguous(memory_format=order) for t in (pred, *others)]
    return tensors, order


def _loss_settings(
    pred: Tensor, first: Tensor, second: Tensor | None, delta: float | None
) -> tuple[int, int, int, dict[str, Any]]:
    """Return batch, elements per sample, programs per sample, and what the kernels are compiled for."""
    size = math.prod(pred.shape[1:])
    block, num_warps = settings.stream_settings(size)
    compiled = {
        "DELTA": delta,
        "MIXED": second is not None,
        "SEEDED": _is_seed(second),
        "BLOCK": block,
        "ACCUMULATE": _TRITON_DTYPES[accumulation_dtype(pred, first)],
        "num_warps": num_warps,
    }
    return pred.shape[0], size, settings.ceil_div(size, block), compiled


def sample_loss(
    pred: Tensor,
    first: Tensor,
    second: Tensor | None,
    mix: Tensor | None,
    weight: Tensor | None,
    delta: float | None,
) -> Tensor:
    """Launch `sample_loss`: sums per chunk of a sample, then the mean of each sample."""
    batch, size, chunks, compiled = _loss_settings(pred, first, second, delta)
    partial = torch.empty(batch, chunks, dtype=accumulation_dtype(pred, first), device=pred.device)
    losses = partial.new_empty(batch)
    if batch == 0:
        return losses
    tensors, _ = _in_one_order(pred, first, second)
    mix = None if mix is None else mix.contiguous()
    weight = None if weight is None else weight.contiguous()
    loss_kernels._error_sum_kernel[batch * chunks,](*tensors, mix, partial, batch, size, chunks, **compiled)
    loss_kernels._sample_mean_kernel[settings.ceil_div(batch, 128),](
        partial, weight, losses, batch, chunks, size, WEIGHTED=weight is not None, BLOCK=128
    )
    return losses


def sample_loss_backward(
    scale: Tensor, pred: Tensor, first: Tensor, second: Tensor | None, mix: Tensor | None, delta: float | None
) -> Tensor:
    """Launch `sample_loss_backward`."""
    grad = torch.empty_like(pred)
    batch, size, chunks, compiled = _loss_settings(pred, first, second, delta)
    if batch == 0:
        return grad
    tensors, order = _in_one_order(pred, first, second)
    written = grad if grad.is_contiguous(memory_format=order) else torch.empty_like(pred, memory_format=order)
    mix = None if mix is None else mix.contiguous()
    loss_kernels._error_backward_kernel[batch * chunks,](
        scale.contiguous(), *tensors, mix, written, batch, size, chunks, **compiled
    )
    return grad if written is grad else grad.copy_(written)


def sample_mse(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Launch `sample_mse`."""
    return sample_loss(pred, target, None, None, weight, None)


def sample_mse_backward(scale: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    """Launch `sample_mse_backward`."""
    return sample_loss_backward(scale, pred, target, None, None, None)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Launch `add_noise`."""
    out = torch.empty_like(x0)
    if x0.numel() == 0:
        return out
    batch, size = x0.shape[0], math.prod(x0.shape[1:])
    block, num_warps = settings.stream_settings(size)
    chunks = settings.ceil_div(size, block)
    tensors, order = _in_one_order(x0, noise)
    written = out if out.is_contiguous(memory_format=order) else torch.empty_like(x0, memory_format=order)
    noise_kernels._add_noise_kernel[batch * chunks,](
        *tensors,
        alpha.contiguous(),
        sigma.contiguous(),
        written,
        size,
        chunks,
        SEEDED=_is_seed(noise),
        BLOCK=block,
        ACCUMULATE=_TRITON_DTYPES[accumulation_dtype(x0)],
        num_warps=num_warps,
    )
    return out if written is out else out.copy_(written)


def philox_normal(seed: Tensor, like: Tensor) -> Tensor:
    """Launch `philox_normal`."""
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    if like.numel():
        size = math.prod(like.shape[1:])
        block, num_warps = settings.stream_settings(size)
        chunks = settings.ceil_div(size, block)
        noise_kernels._philox_normal_kernel[like.shape[0] * chunks,](
            seed, out, size, chunks, BLOCK=block, num_warps=num_warps
        )
    return out


def cluster_means(values: Tensor, cluster: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Launch the mean and the size of every cluster."""
    means = torch.empty(k, dtype=accumulation_dtype(values), device=values.device)
    counts = torch.empty(k, dtype=torch.int64, device=values.device)
    batch = values.shape[0]
    loss_kernels._cluster_mean_kernel[k,](
        values.contiguous(), cluster.contiguous(), means, counts, batch, BLOCK=settings.sample_block(batch)
    )
    return means, counts


def cluster_mean(values: Tensor, cluster: Tensor, k: int) -> Tensor:
    """Launch `cluster_mean`."""
    return cluster_means(values, cluster, k)[0]


def cluster_mse(
    pred: Tensor, target: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `cluster_mse`."""
    return cluster_means(sample_mse(pred, target, weight), cluster, k)


def uncertainty_loss(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `uncertainty_loss`."""
    k, batch = log_var.shape[0], pred.shape[0]
    means, counts = cluster_mse(pred, target, cluster, k, weight)
    loss, slope, log_var_grad = means.new_empty([]), means.new_empty(batch), log_var.new_empty(k)
    loss_kernels._uncertainty_kernel[1,](
        means,
        counts,
        log_var.contiguous(),
        cluster.contiguous(),
        None if weight is None else weight.contiguous(),
        loss,
        slope,
        log_var_grad,
        batch,
        k,
        WEIGHTED=weight is not None,
        TILE=settings.power_of_two(k),
        BLOCK=settings.sample_block(batch),
    )
    return loss, slope, log_var_grad


def uncertainty_loss_backward(
    grad: Tensor, slope: Tensor, log_var_grad: Tensor, log_var: Tensor, pred: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch `uncertainty_loss_backward`."""
    return sample_mse_backward(grad * slope, pred, target), grad * log_var_grad


def gram(jacobian: Sequence[Tensor]) -> Tensor:
    """Launch `gram`."""
    dtype = accumulation_dtype(*jacobian)
    return torch.stack([_gram(as_matrix(member)).to(dtype) for member in jacobian]).sum(0)


def _gram(jacobian: Tensor) -> Tensor:
    k, size = jacobian.shape
    if k > settings.MAX_CLUSTERS or (jacobian.dtype == torch.float64 and k > settings.MAX_VECTOR_CLUSTERS):
        return run_plain("gram", f"no kernel for K = {k} in {jacobian.dtype}", [jacobian])
    dtype = accumulation_dtype(jacobian)
    if k == 0 or size == 0:
        return torch.zeros(k, k, dtype=dtype, device=jacobian.device)
    jacobian = in_rows(jacobian)
    block, num_warps = settings.gram_settings(k, size)
    blocks = settings.ceil_div(size, block)
    if k <= settings.MAX_VECTOR_CLUSTERS:
        partial = torch.empty(blocks, k, k, dtype=dtype, device=jacobian.device)
        gram_kernels._gram_vector_kernel[blocks,](
            jacobian,
            partial,
            size,
            jacobian.stride(0),
            K=k,
            BLOCK=block,
            ACCUMULATE=_TRITON_DTYPES[dtype],
            num_warps=num_warps,
        )
    else:
        run = settings.ceil_div(blocks, 4096)  # so that the partial Gramians stay small beside J
        programs = settings.ceil_div(blocks, run)
        partial = torch.empty(programs, k, k, dtype=dtype, device=jacobian.device)
        gram_kernels._gram_tile_kernel[programs,](
            jacobian,
            partial,
            size,
            jacobian.stride(0),
            run,
            K=k,
            TILE=max(16, settings.power_of_two(k)),
            BLOCK=block,
            PRECISION="ieee" if jacobian.dtype == torch.float32 else "tf32",
            num_warps=num_warps,
        )
    gramian = partial.sum(0, dtype=torch.float64).to(dtype)
    return (gramian + gramian.T) / 2


def combine(jacobian: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Launch `combine`."""
    k = jacobian[0].shape[0]
    if k > settings.MAX_CLUSTERS:
        return run_plain("combine", f"no kernel for K = {k}", jacobian, weights)
    directions = [_combine(as_matrix(member), weights).view(member.shape[1:]) for member in jacobian]
    return [empty_row(j).copy_(d) for j, d in zip(jacobian, directions, strict=True)]


def _combine(jacobian: Tensor, weights: Tensor) -> Tensor:
    k, size = jacobian.shape
    jacobian = in_rows(jacobian)
    out = torch.empty(size, dtype=jacobian.dtype, device=jacobian.device)
    if size:
        block, num_warps = settings.stream_settings(size)
        combine_kernels._combine_kernel[settings.ceil_div(size, block),](
            jacobian,
            weights.contiguous(),
            out,
            size,
            jacobian.stride(0),
            K=k,
            BLOCK=block,
            ACCUMULATE=_TRITON_DTYPES[accumulation_dtype(jacobian)],
            num_warps=num_warps,
        )
    return out


def pcgrad_weights(gramian: Tensor, order: Tensor, present: Tensor) -> Tensor:
    """Launch `pcgrad_weights`."""
    k = gramian.shape[0]
    if k > settings.MAX_CLUSTERS:
        return run_plain("pcgrad_weights", f"no kernel for K = {k}", gramian, order, present)
    weights = gramian.new_empty(k)
    tile, num_warps = settings.weight_settings(k)
    weight_kernels._pcgrad_kernel[1,](
        gramian.contiguous(),
        order.contiguous(),
        present.contiguous(),
        weights,
        K=k,
        TILE=tile,
        num_warps=num_warps,
    )
    return weights


def nash_weights(gramian: Tensor, present: Tensor) -> Tensor:
    """Launch `nash_weights`."""
    k = gramian.shape[0]
    float64 = gramian.dtype == torch.float64
    if k > (settings.MAX_FLOAT64_NASH_CLUSTERS if float64 else settings.MAX_CLUSTERS):
        return run_plain("nash_weights", f"no kernel for K = {k} in {gramian.dtype}", gramian, present)
    weights = gramian.new_empty(k)
    tile, num_warps = settings.weight_settings(k)
    weight_kernels._nash_kernel[1,](
        gramian.contiguous(),
        present.contiguous(),
        weights,
        EPS=torch.finfo(gramian.dtype).eps,
        CONVERGED=CONVERGED,
        K=k,
        TILE=tile,
        NEWTON_STEPS=NEWTON_STEPS,
        LINE_SEARCH_STEPS=LINE_SEARCH_STEPS,
        num_warps=num_warps,
    )
    return weights


LAUNCHERS: dict[str, Any] = {
    launcher.__name__: launcher
    for launcher in (
        add_noise,
        cluster_mean,
        cluster_mse,
        combine,
        gram,
        nash_weights,
        pcgrad_weights,
        philox_normal,
        sample_loss,
        sample_loss_backward,
        sample_mse,
        sample_mse_backward,
        uncertainty_loss,
        uncertainty_loss_backward,
    )
}


def register() -> None:
    """Use the kernels for CUDA tensors (ROCm's too, which PyTorch files under the same key)."""
    for name, launcher in LAUNCHERS.items():
        register_kernel(name, "CUDA", launcher)
