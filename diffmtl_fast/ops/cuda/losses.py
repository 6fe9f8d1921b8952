"""The losses and their gradients by Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...kernels import losses as loss_kernels
from ...kernels import settings
from .._checks import accumulation_dtype
from .._layout import Result, in_one_order
from ..philox import is_seed
from .launches import SUM_DTYPES


def _loss_settings(
    pred: Tensor, first: Tensor, second: Tensor | None, delta: float | None
) -> tuple[int, int, int, dict[str, Any]]:
    """Return batch, elements per sample, programs per sample, and what the kernels are compiled for."""
    size = math.prod(pred.shape[1:])
    block, num_warps = settings.stream_settings(size)
    compiled = {
        "DELTA": delta,
        "MIXED": second is not None,
        "SEEDED": is_seed(first if second is None else second),
        "BLOCK": block,
        "ACCUMULATE": SUM_DTYPES[accumulation_dtype(pred, first)],
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
    """Launch `sample_loss`: sums per chunk of a sample, then their mean; one chunk needs no second step."""
    batch, size, chunks, compiled = _loss_settings(pred, first, second, delta)
    partial = torch.empty(batch, chunks, dtype=accumulation_dtype(pred, first), device=pred.device)
    if batch == 0:
        return partial.view(0)
    tensors, _ = in_one_order(pred, first, second, strided=False)
    mix = None if mix is None else mix.contiguous()
    weight = None if weight is None else weight.contiguous()
    whole = chunks == 1
    loss_kernels._error_sum_kernel[batch * chunks,](
        *tensors, mix, weight if whole else None, partial, batch, size, chunks, WHOLE=whole, **compiled
    )
    if whole:
        return partial.view(batch)
    losses = partial.new_empty(batch)
    loss_kernels._sample_mean_kernel[settings.ceil_div(batch, 128),](
        partial, weight, losses, batch, chunks, size, WEIGHTED=weight is not None, BLOCK=128
    )
    return losses


def _loss_gradients(
    scale: Tensor,
    pred: Tensor,
    first: Tensor,
    second: Tensor | None,
    mix: Tensor | None,
    delta: float | None,
    both: bool,
) -> tuple[Tensor, ...]:
    """Write the gradient by `pred` and, of `both`, that by the target `first`, in one pass."""
    batch, size, chunks, compiled = _loss_settings(pred, first, second, delta)
    tensors, order = in_one_order(pred, first, second, strided=False)
    grads = [Result(leaf, order) for leaf in ((pred, first) if both else (pred,))]
    if batch == 0:
        return tuple(grad.finish() for grad in grads)
    mix = None if mix is None else mix.contiguous()
    loss_kernels._error_backward_kernel[batch * chunks,](
        scale.contiguous(),
        *tensors,
        mix,
        grads[0].written,
        grads[1].written if both else None,
        batch,
        size,
        chunks,
        **compiled,
    )
    return tuple(grad.finish() for grad in grads)


def sample_loss_backward(
    scale: Tensor, pred: Tensor, first: Tensor, second: Tensor | None, mix: Tensor | None, delta: float | None
) -> Tensor:
    """Launch `sample_loss_backward`."""
    return _loss_gradients(scale, pred, first, second, mix, delta, both=False)[0]


def sample_mse_backward_both(scale: Tensor, pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Launch `sample_mse_backward_both`."""
    return _loss_gradients(scale, pred, target, None, None, None, both=True)


def _cluster_means(values: Tensor, cluster: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
    return _cluster_means(values, cluster, k)[0]


def cluster_mse(
    pred: Tensor, target: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `cluster_mse`."""
    return _cluster_means(sample_loss(pred, target, None, None, weight, None), cluster, k)


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
