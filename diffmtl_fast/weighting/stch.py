"""STCH: a smooth maximum of the cluster losses, each relative to its own reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ._interface import LossWeighting, check_losses
from ._losses import log_losses, mask_of
from ._registry import register


@register(
    "stch",
    title="smooth Tchebycheff scalarisation",
    short="STCH",
    update="a smooth maximum of the losses relative to their references",
    year=2024,
)
class STCH(LossWeighting):
    """mu log (1/n) Σ_k exp(log(L_k / r_k) / mu) over the n present clusters: the largest relative loss, smoothed.

    The weights are w_k = n s_k / L_k with s the softmax of log(L_k / r_k) / mu: all of it on the cluster that is
    furthest behind its reference r_k as mu goes to 0, those of `ScaleInvariant` as it grows. A cluster's
    reference is the mean of the last fifth of its first `warmup` losses; until it has them, its loss is its own
    reference, so that a warm-up of all clusters is `ScaleInvariant`. Only steps in which a cluster is present,
    with a finite loss, count for it.

    Source: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024, whose
    definition is mu log Σ_k exp(λ_k (f_k − z_k) / mu); here, as in the authors' multi-task training, with
    f_k = log(L_k / r_k), z = 0, equal λ and mu = 1. Deviations: that training warms up for four epochs and
    averages over a fifth, here steps are counted; it multiplies by n what is divided by n here.

    Args:
        num_clusters: K.
        mu: smoothness of the maximum, positive. Default 1.
        warmup: losses of a cluster after which its reference is fixed. Default 200.

    Attributes:
        reference: r, float32 buffer [K], 0 and then growing until it is fixed.
        count: losses seen of each cluster, at most `warmup`; int64 buffer [K].

    Raises:
        ValueError: `num_clusters` or `warmup` is below 1, or `mu` is not positive.
    """

    reference: Tensor
    count: Tensor

    def __init__(self, num_clusters: int, mu: float = 1.0, warmup: int = 200) -> None:
        super().__init__()
        if num_clusters < 1 or warmup < 1:
            raise ValueError(
                f"expected num_clusters and warmup of at least 1, found {num_clusters} and {warmup}"
            )
        if not mu > 0:
            raise ValueError(f"mu: expected a positive number, found {mu}")
        self.mu, self.warmup = mu, warmup
        self.register_buffer("reference", torch.zeros(num_clusters))
        self.register_buffer("count", torch.zeros(num_clusters, dtype=torch.int64))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the smooth maximum of the present losses, at least 0; see `LossWeighting.forward`."""
        check_losses(losses, self.reference.shape[0])
        present = mask_of(losses, present)
        logs = log_losses(losses, present)
        references = torch.where(self.count == self.warmup, self.reference.to(losses).log(), logs.detach())
        behind = ((logs - references) / self.mu).masked_fill(~present, -torch.inf)
        self._record(losses.detach(), present)
        return self.mu * (behind.logsumexp(0) - present.sum().to(losses).log())

    @torch.no_grad()
    def _record(self, losses: Tensor, present: Tensor) -> None:
        averaged = max(1, self.warmup // 5)
        counted = present & losses.isfinite() & (self.count < self.warmup)
        kept = counted & (self.count >= self.warmup - averaged)
        self.reference += torch.where(kept, losses / averaged, 0)
        self.count += counted

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"num_clusters={self.reference.shape[0]}, mu={self.mu}, warmup={self.warmup}"
