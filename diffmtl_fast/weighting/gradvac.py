"""GradVac: gradients pulled towards the cosines that they have had so far."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import gradvac_weights
from ._interface import GramianWeighting
from ._registry import register
from .pcgrad import PCGrad


@register(
    "gradvac",
    title="GradVac",
    update="gradients pulled towards the cosines that they have had so far",
    year=2021,
)
class GradVac(GramianWeighting):
    """Gradient vaccine: as PCGrad, with a learned cosine in place of 0.

    Every cluster k visits all others j in a random order. Where the cosine φ of g_k' and the original g_j is below
    its target φ̂_kj, g_k' += |g_k'| (φ̂ √(1−φ²) − φ √(1−φ̂²)) / (|g_j| √(1−φ̂²)) g_j, which makes the cosine φ̂;
    then φ̂_kj ← (1−β) φ̂_kj + β φ, and at most 1 − 10⁻⁶, as the correction has no bound at 1. The targets begin at
    0, so the first step is PCGrad's. d is the mean of the g_k'. A common factor of the gradients does not change
    the weights. The targets of absent clusters stay as they are.

    Source: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models", ICLR 2021, algorithm 1, with one group of parameters.

    Args:
        num_clusters: K.
        beta: the rate β at which the targets follow the cosines. Default 0.5, as in public implementations.
        generator: draws the orders; see `PCGrad`.

    Attributes:
        targets: φ̂, float64 [K, K].

    Raises:
        ValueError: `num_clusters` is below 1, or `beta` is not between 0 and 1.
    """

    def __init__(
        self, num_clusters: int, beta: float = 0.5, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if num_clusters < 1:
            raise ValueError(f"num_clusters: expected at least 1, found {num_clusters}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: expected 0 to 1, found {beta}")
        self.beta = beta
        self.targets: Tensor
        self.register_buffer("targets", torch.zeros(num_clusters, num_clusters, dtype=torch.float64))
        self.orders = PCGrad(generator)

    def forward(self, gramian: Tensor | None, present: Tensor | None = None) -> Tensor:
        """Return the weights for a freshly drawn order, and move the targets; see `GramianWeighting.forward`."""
        if gramian is None:
            raise TypeError("gramian: expected a tensor [K, K], found None")
        if len(gramian) != len(self.targets):
            raise ValueError(f"gramian: expected K = {len(self.targets)}, found K = {len(gramian)}")
        order = self.orders.draw_order(len(gramian), gramian.device)
        weights, moved = gradvac_weights(gramian, order, self.targets, self.beta, present)
        self.targets.copy_(moved.detach())
        return weights

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"num_clusters={len(self.targets)}, beta={self.beta}"
