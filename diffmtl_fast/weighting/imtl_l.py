"""IMTL-L: learned scales that bring all losses to the same size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._interface import LossWeighting, check_losses, masked_mean
from ._registry import register


@register(
    "imtl_l",
    title="IMTL-L",
    short="IMTL-L",
    update="one learned scale per cluster, which makes its loss 1",
    year=2021,
)
class IMTLL(LossWeighting):
    """(1/n) Σ_k (e^{s_k} L_k − s_k) over the n present clusters, with learned log-scales s: w_k = e^{s_k}.

    The minimum over s_k is at e^{s_k} L_k = 1. The log-scales are learned by the same optimizer as the model, at a
    rate of their own: see `param_groups`. An absent cluster leaves its s_k without gradient.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, the part that balances losses.
    Deviation: the paper adds the clusters up, here their mean is taken, so that training starts with w = 1. It
    differs from `UncertaintyWeighting` with s = −u by the weight ½ of the logarithm there, and by what both sum.

    Args:
        num_clusters: K.

    Attributes:
        log_scale: s, float32 parameter [K], starts at 0.

    Raises:
        ValueError: `num_clusters` is below 1.
    """

    def __init__(self, num_clusters: int) -> None:
        super().__init__()
        if num_clusters < 1:
            raise ValueError(f"num_clusters: expected at least 1, found {num_clusters}")
        self.log_scale = nn.Parameter(torch.zeros(num_clusters))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the mean of the scaled present losses; see `LossWeighting.forward`."""
        check_losses(losses, self.log_scale.shape[0])
        return masked_mean(self.log_scale.exp() * losses - self.log_scale, present)

    def extra_repr(self) -> str:
        """Show K."""
        return f"num_clusters={self.log_scale.shape[0]}"
