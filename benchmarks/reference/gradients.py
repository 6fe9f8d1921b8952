"""Per-cluster gradients the published way: one backward pass per cluster through one retained graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClusterGradients:
    """What one batch says about each of K clusters.

    Attributes:
        jacobian: [K, P], row k the gradient of cluster k's mean loss; zero for an absent cluster.
        losses: [K], detached mean losses; zero for an absent cluster.
        present: [K] bool, whether the batch has a sample of the cluster.
    """

    jacobian: Tensor
    losses: Tensor
    present: Tensor


def cluster_means(losses: Tensor, cluster: Tensor, num_clusters: int) -> list[Tensor | None]:
    """Average the per-sample losses of each cluster.

    Args:
        losses: [B], per-sample losses.
        cluster: [B] int64 in 0..K-1.
        num_clusters: K.

    Returns:
        K scalars with a graph; None for a cluster that no sample belongs to.
    """
    masks = [cluster == k for k in range(num_clusters)]
    return [losses[mask].mean() if mask.any() else None for mask in masks]


def cluster_gradients(
    losses: Tensor, cluster: Tensor, parameters: Sequence[Tensor], num_clusters: int
) -> ClusterGradients:
    """Differentiate every cluster's mean loss with a backward pass of its own.

    Args:
        losses: [B], per-sample losses with a graph.
        cluster: [B] int64 in 0..K-1.
        parameters: the tensors to differentiate by; P is their number of elements.
        num_clusters: K.

    Returns:
        The Jacobian in the parameters' promoted dtype, the cluster losses and the mask of present clusters.
    """
    means = cluster_means(losses, cluster, num_clusters)
    present = torch.tensor([mean is not None for mean in means], device=losses.device)
    zero = torch.cat([torch.zeros_like(p).flatten() for p in parameters])
    rows = []
    for mean in means:
        if mean is None:
            rows.append(zero)
            continue
        grads = torch.autograd.grad(mean, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    values = [losses.new_zeros(()) if mean is None else mean.detach() for mean in means]
    return ClusterGradients(torch.stack(rows), torch.stack(values), present)
