"""`cluster_mean`: per-sample values averaged within each cluster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._host import on_host
from ._checks import accumulation_dtype, check_cluster, check_floating
from ._library import define_op, refuse_autograd, register_autograd


def _membership(cluster: Tensor, k: int) -> Tensor:
    """Return the bool mask [k, B] of which sample belongs to which cluster."""
    if on_host(cluster):
        for index in cluster[(cluster < 0) | (cluster >= k)].tolist()[:1]:
            raise ValueError(f"cluster: expected indices in 0..{k - 1}, found {index}")
    return cluster == torch.arange(k, device=cluster.device).unsqueeze(1)


def cluster_sizes(cluster: Tensor, k: int) -> Tensor:
    """Count the samples of each cluster, int64 [k], without synchronisation."""
    return _membership(cluster, k).sum(1)


def cluster_mean_plain(values: Tensor, cluster: Tensor, k: int) -> Tensor:
    """Compute `cluster_mean` by its definition."""
    members = _membership(cluster, k)
    # A masked sum, not index_add: its order is fixed, and a NaN stays within its own cluster.
    sums = torch.where(members, values.to(accumulation_dtype(values)), 0).sum(1)
    return sums / members.sum(1).clamp(min=1)


def cluster_mean_backward_plain(grad: Tensor, cluster: Tensor) -> Tensor:
    """Compute the gradient by the values, grad[cluster_b] / (size of cluster_b), [B]."""
    return (grad / cluster_sizes(cluster, grad.shape[0]).clamp(min=1))[cluster]


_cluster_mean = define_op(
    "cluster_mean(Tensor values, Tensor cluster, int k) -> Tensor",
    plain=cluster_mean_plain,
    fake=lambda values, cluster, k: values.new_empty([k], dtype=accumulation_dtype(values)),
)
_cluster_mean_backward = define_op(
    "cluster_mean_backward(Tensor grad, Tensor cluster) -> Tensor",
    plain=cluster_mean_backward_plain,
    fake=lambda grad, cluster: grad.new_empty(cluster.shape),
)
refuse_autograd("cluster_mean_backward", "the second derivative of cluster_mean is not implemented")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    values, cluster, _ = inputs
    ctx.save_for_backward(cluster)
    ctx.dtype = values.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (cluster,) = ctx.saved_tensors
    return _cluster_mean_backward(grad, cluster).to(ctx.dtype), None, None


register_autograd("cluster_mean", _backward, _setup_context)


def cluster_mean(values: Tensor, cluster: Tensor, k: int) -> Tensor:
    """Average per-sample values within each cluster, L_k = mean of the values whose cluster is k.

    Args:
        values: [B], floating point, for example per-sample losses.
        cluster: int64 [B], indices in 0..k-1.
        k: number of clusters.

    Returns:
        [k], float32 at least; 0 with zero gradient for a cluster without samples.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: a shape or device does not fit, or (checked on the CPU only, where it costs no
            synchronisation) an index is out of range.
    """
    check_floating(values=values)
    if values.dim() != 1:
        raise ValueError(f"values: expected shape [B], found {list(values.shape)}")
    check_cluster(cluster, k, values)
    return _cluster_mean(values, cluster, k)
