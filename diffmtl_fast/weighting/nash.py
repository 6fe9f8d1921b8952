"""NashMTL: the clusters bargain for the update direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import nash_weights
from ._interface import GramianWeighting
from ._registry import register


@register(
    "nash",
    title="NashMTL",
    update="the Nash bargaining solution, by a Newton method",
    year=2022,
    clip=1.0,
    published_every=25,
    studied=True,
)
class NashMTL(GramianWeighting):
    """Nash bargaining weights, the α > 0 with G α = 1/α; see `ops.nash_weights`.

    Between refreshes the last weights are used again, no gradients per cluster are formed, and the step costs a
    plain step. A cluster absent at a refresh keeps its earlier weight; before its first refresh that is 1.
    Weights that are not finite (gradients overflowed) are returned, so that the step shows it, but not kept.

    The published training clips the gradient norm to 1 with this method; the trainer does, this class does not.

    Args:
        update_every: steps from one refresh of the weights to the next. Default 1, exact at every step; the
            timestep clustering paper's public code uses 25, to save the time that its solver takes.

    Attributes:
        weights: the weights in use, [K]; None before the first step.
        steps: calls so far.

    Raises:
        ValueError: `update_every` is below 1.
    """

    def __init__(self, update_every: int = 1) -> None:
        super().__init__()
        if update_every < 1:
            raise ValueError(f"update_every: expected at least 1, found {update_every}")
        self.update_every = update_every
        self.weights: Tensor | None = None
        # On the host, so that asking for it never waits for a device.
        self.steps = 0

    @property
    def needs_gramian(self) -> bool:
        """Whether the next call refreshes the weights."""
        return self.weights is None or self.steps % self.update_every == 0

    def forward(self, gramian: Tensor | None, present: Tensor | None = None) -> Tensor:
        """Return the weights, refreshed if it is time; see `GramianWeighting.forward`."""
        if self.needs_gramian:
            if gramian is None:
                raise TypeError(f"gramian: expected a tensor [K, K] at step {self.steps}, found None")
            current = self._refresh(gramian, present)
        else:
            assert self.weights is not None
            current = self.weights if present is None else self.weights.to(present.device)
        self.steps += 1
        return current.clone() if present is None else torch.where(present, current, 0)

    def _refresh(self, gramian: Tensor, present: Tensor | None) -> Tensor:
        found = nash_weights(gramian, present)
        kept = torch.ones_like(found) if self.weights is None else self.weights.to(found)
        if kept.shape != found.shape:
            raise ValueError(f"gramian: expected K = {kept.shape[0]} as before, found K = {found.shape[0]}")
        current = found if present is None else torch.where(present, found, kept)
        self.weights = torch.where(current.isfinite().all(), current, kept)
        return current

    def get_extra_state(self) -> dict[str, Any]:
        """Return the weights in use and the step counter for `state_dict`."""
        return {"weights": self.weights, "steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the weights in use and the step counter from `state_dict`."""
        self.weights, self.steps = state["weights"], int(state["steps"])

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"update_every={self.update_every}"
