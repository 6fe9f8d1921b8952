"""RLW: random weights, drawn anew at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from .._host import upload
from ._generator import DrawsNumbers
from ._interface import LossWeighting, check_losses
from ._losses import mask_of, masked_softmax
from ._registry import register


@register(
    "rlw",
    title="random loss weights",
    short="RLW",
    update="the cluster losses with random weights, new at every step",
    year=2022,
)
class RLW(DrawsNumbers, LossWeighting):
    """Σ_k softmax(z)_k L_k over the n present clusters, z ~ N(0, 1): w_k = n softmax(z)_k, on average 1.

    The baseline that every balancing method should beat.

    Source: Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    TMLR 2022, with normal weights.

    Args:
        generator: draws z, on its own device. Its state is part of `state_dict`, so a resumed run repeats the same
            weights. Default: torch's default generator of the losses' device.
    """

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the present losses under freshly drawn weights; see `LossWeighting.forward`."""
        check_losses(losses)
        present = mask_of(losses, present)
        drawn = torch.randn(losses.shape, generator=self.generator, device=self.source(losses.device))
        shares = masked_softmax(upload(drawn, losses.device).to(losses.dtype), present)
        return (shares * torch.where(present, losses, 0)).sum()
