"""Scale-invariant losses: the mean of their logarithms."""

from __future__ import annotations

from torch import Tensor

from ._interface import LossWeighting, check_losses, masked_mean
from ._losses import log_losses, mask_of
from ._registry import register


@register(
    "si",
    title="scale-invariant losses",
    short="SI",
    update="the mean of the logarithms of the losses",
    year=2022,
)
class ScaleInvariant(LossWeighting):
    """(1/n) Σ_k log L_k over the n present clusters: w_k = 1 / L_k.

    A loss times a constant trains alike, so that clusters weigh by how fast their losses fall in proportion.

    Source: the baseline SI of Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, and the loss
    scale half of DB-MTL (Lin et al., "Dual-Balancing for Multi-Task Learning", 2023, arXiv 2308.12029), whose
    other half needs the gradients of the clusters. Deviations: DB-MTL adds 1e-8 to the losses, here nothing; the
    sources add the logarithms up, here their mean is taken.
    """

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the mean logarithm of the present losses, which are at least 0; see `LossWeighting.forward`."""
        check_losses(losses)
        return masked_mean(log_losses(losses, mask_of(losses, present)), present)
