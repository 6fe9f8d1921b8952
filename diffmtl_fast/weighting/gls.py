"""GLS: the geometric mean of the cluster losses."""

from __future__ import annotations

from torch import Tensor

from ._interface import LossWeighting, check_losses, masked_mean
from ._losses import log_losses, mask_of
from ._registry import register


@register(
    "gls",
    title="geometric loss strategy",
    short="GLS",
    update="the geometric mean of the cluster losses",
    year=2019,
)
class GLS(LossWeighting):
    """(Π_k L_k)^{1/n} over the n present clusters: w_k = geometric mean / L_k.

    The direction is that of `ScaleInvariant`, the length follows the losses.

    Source: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for
    Multi-Task Learning", CVPR Workshops 2019.
    """

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the geometric mean of the present losses, which are at least 0; see `LossWeighting.forward`."""
        check_losses(losses)
        return masked_mean(log_losses(losses, mask_of(losses, present)), present).exp()
