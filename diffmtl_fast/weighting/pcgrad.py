"""PCGrad: conflicting gradients lose their component along each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .._host import upload
from ..ops import pcgrad_weights
from ._interface import GramianWeighting
from ._registry import register


@register(
    "pcgrad",
    title="PCGrad",
    update="conflicting gradients lose their component along each other",
    year=2020,
    studied=True,
)
class PCGrad(GramianWeighting):
    """Project each cluster gradient off those it conflicts with, in random order, and sum the results.

    The variant is that of the original algorithm and of the timestep clustering paper's public code: every
    cluster k visits all others in a random order of its own; projections are onto the original g_j, not onto
    already projected ones; the projected gradients are added (here: averaged over the present clusters, like the
    losses). Only inner products are needed, so the Gramian decides; see `ops.pcgrad_weights`.

    Args:
        generator: draws the orders, on its own device. Its state is part of `state_dict`, so a resumed run
            repeats the same orders. Default: torch's default generator of the Gramian's device.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

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
        source = device if self.generator is None else self.generator.device
        keys = torch.rand(k, k, generator=self.generator, device=source)
        keys.fill_diagonal_(2.0)  # above every key in [0, 1): the cluster itself comes last and is cut off
        return upload(keys.argsort(dim=1)[:, : k - 1], torch.device(device))

    def get_extra_state(self) -> Tensor | None:
        """Return the generator's state for `state_dict`."""
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Restore the generator's state from `state_dict`.

        Raises:
            ValueError: one of the two, the saved weighting and this one, has a generator and the other has not.
        """
        if (state is None) != (self.generator is None):
            saved, here = (
                ("without" if state is None else "with"),
                ("without" if self.generator is None else "with"),
            )
            raise ValueError(f"PCGrad: expected a state saved {here} a generator, found one saved {saved}")
        if self.generator is not None and state is not None:
            self.generator.set_state(state.cpu())
