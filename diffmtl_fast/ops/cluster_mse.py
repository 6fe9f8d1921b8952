"""`cluster_mse`: the mean squared error of every cluster, the loss L_k of a denoising task."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import accumulation_dtype, check_cluster, check_pair, check_same_device
from ._library import define_op, register_autograd
from .cluster_mean import cluster_mean_backward_plain, cluster_mean_plain
from .sample_mse import pair_gradients, sample_mse_plain


def cluster_mse_plain(pred: Tensor, target: Tensor, cluster: Tensor, k: int) -> Tensor:
    """Compute `cluster_mse` by its definition."""
    return cluster_mean_plain(sample_mse_plain(pred, target), cluster, k)


def _fake(pred: Tensor, target: Tensor, cluster: Tensor, k: int) -> Tensor:
    return pred.new_empty([k], dtype=accumulation_dtype(pred, target))


_cluster_mse = define_op(
    "cluster_mse(Tensor pred, Tensor target, Tensor cluster, int k) -> Tensor",
    plain=cluster_mse_plain,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    pred, target, cluster = ctx.saved_tensors
    grad_sample = cluster_mean_backward_plain(grad, cluster)
    return *pair_gradients(grad_sample, pred, target, ctx.needs_input_grad), None, None


register_autograd("cluster_mse", _backward, _setup_context)


def cluster_mse(pred: Tensor, target: Tensor, cluster: Tensor, k: int) -> Tensor:
    """Mean squared error of every cluster, L_k = mean of `sample_mse` over the samples of cluster k.

    Args:
        pred: [B, ...], floating point.
        target: of the same shape and device; the dtype may differ.
        cluster: int64 [B], indices in 0..k-1, in any order.
        k: number of clusters.

    Returns:
        [k], in the promoted dtype of both and float32 at least; 0 with zero gradient for a cluster without
        samples. Autocast does not change it.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices differ, a sample has no elements, or (checked on the CPU only, where it
            costs no synchronisation) an index is out of range.
    """
    check_pair(pred, target)
    check_same_device(pred=pred, cluster=cluster)
    check_cluster(cluster, k, pred.shape[0])
    return _cluster_mse(pred, target, cluster, k)
