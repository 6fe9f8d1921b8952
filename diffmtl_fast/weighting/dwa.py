"""DWA: clusters whose losses fall slowly weigh more."""

from __future__ import annotations

import torch
from torch import Tensor

from ._interface import LossWeighting, check_losses
from ._losses import mask_of, masked_softmax
from ._registry import register


@register(
    "dwa",
    title="dynamic weight average",
    short="DWA",
    update="more of the clusters whose losses fall slowly",
    year=2019,
)
class DWA(LossWeighting):
    """Σ_k softmax(r / temperature)_k L_k over the n present clusters, r_k the ratio of the last two mean losses.

    The weights are w_k = n softmax(r / temperature)_k. Each cluster averages its losses over windows of its own:
    r_k is the mean of the last full window over that of the one before, and 1 until there are two. A window counts
    the steps in which the cluster is present, so that an absent one keeps its state. Losses that are not finite
    are not counted.

    Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, with temperature 2.
    Deviation: there a window is an epoch, which diffusion models hardly count in.

    Args:
        num_clusters: K.
        window: steps over which losses are averaged, an epoch in the paper. Default 100.
        temperature: evens the weights out, without limit as it grows. Default 2.

    Attributes:
        ratio: r, float32 buffer [K].
        previous: mean loss of each cluster's last full window, float32 buffer [K]; NaN before the first.
        total: sum of the losses of the window that runs, float32 buffer [K].
        count: how many they are, int64 buffer [K].

    Raises:
        ValueError: `num_clusters` or `window` is below 1, or `temperature` is not positive.
    """

    ratio: Tensor
    previous: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, num_clusters: int, window: int = 100, temperature: float = 2.0) -> None:
        super().__init__()
        if num_clusters < 1 or window < 1:
            raise ValueError(
                f"expected num_clusters and window of at least 1, found {num_clusters} and {window}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, found {temperature}")
        self.window, self.temperature = window, temperature
        self.register_buffer("ratio", torch.ones(num_clusters))
        self.register_buffer("previous", torch.full((num_clusters,), torch.nan))
        self.register_buffer("total", torch.zeros(num_clusters))
        self.register_buffer("count", torch.zeros(num_clusters, dtype=torch.int64))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the present losses; see `LossWeighting.forward`."""
        check_losses(losses, self.ratio.shape[0])
        present = mask_of(losses, present)
        shares = masked_softmax((self.ratio / self.temperature).to(losses), present)
        self._record(losses.detach(), present)
        return (shares * torch.where(present, losses, 0)).sum()

    @torch.no_grad()
    def _record(self, losses: Tensor, present: Tensor) -> None:
        counted = present & losses.isfinite()
        self.total += torch.where(counted, losses, 0)
        self.count += counted
        full = self.count == self.window
        mean = self.total / self.window
        second = full & ~self.previous.isnan()
        self.ratio.copy_(torch.where(second, mean / self.previous, self.ratio))
        self.previous.copy_(torch.where(full, mean, self.previous))
        self.total.masked_fill_(full, 0)
        self.count.masked_fill_(full, 0)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"num_clusters={self.ratio.shape[0]}, window={self.window}, temperature={self.temperature}"
