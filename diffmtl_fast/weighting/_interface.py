"""What a weighting is: a small module that turns losses, or their gradients' Gramian, into the update."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LossWeighting(nn.Module):
    """Balances from the losses alone: losses [K] and present [K] → one scalar to differentiate.

    It needs no per-cluster gradients, so a training step with it is a plain step.
    """

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Combine the cluster losses.

        Args:
            losses: [K], floating point.
            present: bool [K]; absent clusters take no part. Default: all present.

        Returns:
            The scalar to minimise.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(losses, present)")


class GramianWeighting(nn.Module):
    """Balances from the Gramian of the cluster gradients: G [K, K] and present [K] → weights [K].

    The update direction is d = (1/n) Σ_k w_k g_k over the n present clusters, so that w = 1 is ordinary training
    on the mean of the cluster losses.
    """

    @property
    def needs_gramian(self) -> bool:
        """Whether the next call needs the Gramian; where it does not, the step costs a plain step."""
        return True

    def forward(self, gramian: Tensor | None, present: Tensor | None = None) -> Tensor:
        """Compute the weights.

        Args:
            gramian: G, [K, K], floating point, or None where `needs_gramian` is false.
            present: bool [K]; an absent cluster gets weight 0. Default: all present.

        Returns:
            w, [K].
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(gramian, present)")


def masked_mean(values: Tensor, present: Tensor | None) -> Tensor:
    """Mean over the present entries, without reading the mask on the host; 0 where none is present."""
    if present is None:
        return values.mean()
    return torch.where(present, values, 0).sum() / present.sum().clamp(min=1)


def check_losses(losses: Tensor, num_clusters: int | None = None) -> None:
    """Refuse anything but floating-point losses [K]."""
    expected = "K" if num_clusters is None else str(num_clusters)
    if not losses.is_floating_point():
        raise TypeError(f"losses: expected a floating-point tensor [{expected}], found {losses.dtype}")
    if losses.dim() != 1 or (num_clusters is not None and losses.shape[0] != num_clusters):
        raise ValueError(f"losses: expected shape [{expected}], found {list(losses.shape)}")
