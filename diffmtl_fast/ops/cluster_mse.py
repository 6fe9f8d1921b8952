"""`cluster_mse`: the mean squared error of every cluster, the loss L_k of a denoising task."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_cluster, check_pair, check_weight
from ._library import define_op, register_autograd
from .cluster_mean import cluster_mean_plain, cluster_sizes
from .sample_mse import pair_gradients, sample_mse_plain


def cluster_mse_plain(
    pred: Tensor, target: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `cluster_mse` and the counts by their definition."""
    losses = cluster_mean_plain(sample_mse_plain(pred, target, weight), cluster, k)
    return losses, cluster_sizes(cluster, k)


def _fake(
    pred: Tensor, target: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    losses = pred.new_empty([k], dtype=accumulation_dtype(pred, target))
    return losses, pred.new_empty([k], dtype=torch.int64)


_cluster_mse = define_op(
    "cluster_mse(Tensor pred, Tensor target, Tensor cluster, int k, Tensor? weight=None) -> (Tensor, Tensor)",
    plain=cluster_mse_plain,
    fake=_fake,
)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, Tensor | None], output: tuple[Tensor, Tensor]
) -> None:
    pred, target, cluster, _, weight = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(pred, target, cluster, weight, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    pred, target, cluster, weight, counts = ctx.saved_tensors
    scale = (grad / counts.clamp(min=1)).index_select(0, cluster)
    scale = scale if weight is None else scale * weight
    return *pair_gradients(scale, pred, target, ctx.needs_input_grad), None, None, None


register_autograd("cluster_mse", _backward, _setup_context)


@overload
def cluster_mse(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    return_counts: Literal[False] = False,
) -> Tensor: ...
@overload
def cluster_mse(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    return_counts: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def cluster_mse(
    pred: Tensor,
    target: Tensor,
    cluster: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean squared error of every cluster, L_k = mean of `sample_mse` over the samples of cluster k.

    Args:
        pred: [B, ...], floating point.
        target: of the same shape and device; the dtype may differ.
        cluster: int64 [B], indices in 0..k-1, in any order.
        k: number of clusters.
        weight: [B], floating point, without gradient: loss weights such as Min-SNR's. Default: 1.
        return_counts: also return the number of samples of each cluster, int64 [k].

    Returns:
        [k], in the promoted dtype of both and float32 at least; 0 with zero gradient for a cluster without
        samples. Autocast does not change it.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices differ, a sample has no elements, the weight requires a gradient, or (checked
            on the CPU only, where it costs no synchronisation) an index is out of range.
    """
    check_pair(pred, target)
    check_weight(weight, pred)
    check_cluster(cluster, k, pred)
    losses, counts = _cluster_mse(pred, target, cluster, k, weight)
    return (losses, counts) if return_counts else losses
