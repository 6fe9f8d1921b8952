"""Uncertainty weighting: one learned log-variance per cluster."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._interface import LossWeighting, check_losses
from ._registry import register


@register(
    "uw",
    title="uncertainty weighting",
    short="UW",
    update="one learned log-variance per cluster",
    year=2018,
    studied=True,
)
class UncertaintyWeighting(LossWeighting):
    """Σ_k ½ (e^{−u_k} L_k / n + u_k) over the n present clusters, with learned log-variances u.

    The log-variances are learned by the same optimizer as the model, at a rate of their own: see `param_groups`.
    An absent cluster leaves its u_k without gradient. In the convention d = (1/n) Σ w_k g_k the weights are
    w_k = ½ e^{−u_k}.

    Source: Kendall et al., "Multi-Task Learning Using Uncertainty", CVPR 2018, in the form of the timestep
    clustering paper's public code (Go et al., NeurIPS 2023). Deviation: it divides by K; here n takes its place,
    which is the same whenever every cluster is present.

    Args:
        num_clusters: K.

    Attributes:
        log_var: u, float32 parameter [K], starts at 0.

    Raises:
        ValueError: `num_clusters` is below 1.
    """

    def __init__(self, num_clusters: int) -> None:
        super().__init__()
        if num_clusters < 1:
            raise ValueError(f"num_clusters: expected at least 1, found {num_clusters}")
        self.log_var = nn.Parameter(torch.zeros(num_clusters))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the present losses; see `LossWeighting.forward`."""
        check_losses(losses, self.log_var.shape[0])
        number = losses.shape[0] if present is None else present.sum().clamp(min=1)
        terms = 0.5 * (torch.exp(-self.log_var) * losses / number + self.log_var)
        return terms.sum() if present is None else torch.where(present, terms, 0).sum()

    def extra_repr(self) -> str:
        """Show K."""
        return f"num_clusters={self.log_var.shape[0]}"
