"""Constant weights of the clusters, chosen by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._interface import LossWeighting, check_losses, masked_mean
from ._registry import register


@register("constant", title="constant weights", update="the mean of the cluster losses times given weights")
class Constant(LossWeighting):
    """(1/n) Σ_k w_k L_k over the n present clusters, with weights that are given.

    Args:
        num_clusters: K.
        weights: the K weights, at least 0. Default: 1 for each, which is `Equal`.

    Attributes:
        weights: buffer, float32 [K].

    Raises:
        ValueError: there are not K weights, or one is negative or not finite.
    """

    weights: Tensor

    def __init__(self, num_clusters: int, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        given = torch.ones(num_clusters) if weights is None else torch.tensor([float(w) for w in weights])
        if given.shape != (num_clusters,) or not ((given >= 0) & given.isfinite()).all():
            raise ValueError(
                f"weights: expected {num_clusters} finite numbers of at least 0, found {given.tolist()}"
            )
        self.register_buffer("weights", given)

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the mean of the weighted present losses; see `LossWeighting.forward`."""
        check_losses(losses, len(self.weights))
        return masked_mean(losses * self.weights, present)

    def extra_repr(self) -> str:
        """Show the number of clusters."""
        return f"num_clusters={len(self.weights)}"
