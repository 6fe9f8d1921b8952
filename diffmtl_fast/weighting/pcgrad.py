"""PCGrad: conflicting gradients lose their component along each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .._host import upload
from ..ops import pcgrad_weights
from ._generator import DrawsNumbers
from ._interface import GramianWeighting
from ._registry import register


@register(
    "pcgrad",
    title="PCGrad",
    update="conflicting gradients lose their component along each other",
    year=2020,
    studied=True,
)
class PCGrad(DrawsNumbers, GramianWeighting):
    """Project each cluster gradient off those it conflicts with, in random order, and sum the results.

    The variant is that of the original algorithm and of the timestep clustering paper's public code: every
    cluster k visits all others in a random order of its own; projections are onto the original g_j, not onto
    already projected ones; the projected gradients are added (here: averaged over the present clusters, like the
    losses). Only inner products are needed, so the Gramian decides; see `ops.pcgrad_weights`.

    Args:
        generator: draws the orders, on its own device. Its state is part of `state_dict`, so a resumed run
            repeats the same orders. Default: torch's default generator of the Gramian's device.
    """

    def forward(self, gramian: Tensor | None, present: Tensor | None = None) -> Tensor:
        """Return the weights for a freshly drawn order; see `GramianWeighting.forward`."""
        if gramian is None:
            raise TypeError("gramian: expected a tensor [K, K], found None")
        return pcgrad_weights(gramian, self.draw_order(gramian.shape[0], gramian.device), present)

    def draw_order(self, k: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw for every cluster a random order of the others.

        Returns:
            int64 [k, k-1] on `device`; row i is a permutation of all indices but i.
        """
        keys = torch.rand(k, k, generator=self.generator, device=self.source(device))
        keys.fill_diagonal_(2.0)  # above every key in [0, 1): the cluster itself comes last and is cut off
        return upload(keys.argsort(dim=1)[:, : k - 1], torch.device(device))
