"""Equal weights: ordinary training on the mean of the cluster losses."""

from __future__ import annotations

from torch import Tensor

from ._interface import LossWeighting, check_losses, masked_mean
from ._registry import register


@register("equal", title="equal weights", update="the mean of the cluster losses")
class Equal(LossWeighting):
    """The mean of the losses of the present clusters: w = 1, the baseline of all weightings."""

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the mean of the present losses; see `LossWeighting.forward`."""
        check_losses(losses)
        return masked_mean(losses, present)
