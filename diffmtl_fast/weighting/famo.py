"""FAMO: learned weights under which all losses fall at the same rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._interface import LossWeighting, check_losses
from ._losses import log_losses, mask_of, masked_softmax
from ._registry import register


@register(
    "famo",
    title="FAMO",
    update="learned weights under which all losses fall at the same rate",
    year=2023,
)
class FAMO(LossWeighting):
    """Σ_k z_k log L_k / Σ_k (z_k / L_k) over the n present clusters, with z the softmax of learned logits ξ.

    The divisor is held fixed when the scalar is differentiated, so that w_k = n (z_k / L_k) / Σ_j (z_j / L_j), on
    average 1. The logits descend along Σ_k (∂z_k/∂ξ) δ_k + decay ξ, where δ_k = log L_k(before) − log L_k(now) is
    how far the logarithm of the loss has fallen: a cluster that improves more than the others loses weight. That
    slope is what the scalar has with respect to ξ (its value is not changed by it), so the logits are learned by
    the same optimizer as the model, at a rate of their own: see `param_groups`, whose 0.025 and Adam are FAMO's.

    Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, arXiv 2306.03792, with the
    released code's defaults; the losses' lower bounds are taken as 0.
    Deviation: FAMO evaluates the losses of the same batch again after the update, which costs a second forward.
    Here L_k(now) is the loss of the next batch that has the cluster, so δ also holds the difference of the two
    batches, and the logits change one step later.

    Args:
        num_clusters: K.
        decay: of the logits towards 0, that is of the z towards each other. Default 0.01.

    Attributes:
        logits: ξ, float32 parameter [K], starts at 0.
        log_before: log of the last finite loss of each cluster, float32 buffer [K]; NaN before the first.

    Raises:
        ValueError: `num_clusters` is below 1, or `decay` is negative.
    """

    log_before: Tensor

    def __init__(self, num_clusters: int, decay: float = 0.01) -> None:
        super().__init__()
        if num_clusters < 1:
            raise ValueError(f"num_clusters: expected at least 1, found {num_clusters}")
        if not decay >= 0:
            raise ValueError(f"decay: expected at least 0, found {decay}")
        self.decay = decay
        self.logits = nn.Parameter(torch.zeros(num_clusters))
        self.register_buffer("log_before", torch.full((num_clusters,), torch.nan))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the weighted logarithms of the present losses, at least 0; see `LossWeighting.forward`."""
        check_losses(losses, self.logits.shape[0])
        present = mask_of(losses, present)
        logs = log_losses(losses, present)
        now = logs.detach()
        shares = masked_softmax(self.logits, present)
        fixed = shares.detach().to(losses)
        scalar = (fixed * logs).sum() / (fixed * torch.exp(-now)).sum()
        learned = (shares * self._fallen(now, present)).sum()
        learned = learned + 0.5 * self.decay * torch.where(present, self.logits, 0).square().sum()
        return scalar + (learned - learned.detach()).to(losses)

    @torch.no_grad()
    def _fallen(self, now: Tensor, present: Tensor) -> Tensor:
        """δ, 0 where it is not known; and remember the logarithms for the next step."""
        finite = present & now.isfinite()
        fallen = torch.where(finite & ~self.log_before.isnan(), self.log_before - now, 0)
        self.log_before.copy_(torch.where(finite, now, self.log_before))
        return fallen

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"num_clusters={self.logits.shape[0]}, decay={self.decay}"
