"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .._torch import foreach_lerp_


class Ema:
    """A second model whose parameters follow the first's.

    The decay rises from 0 as (1 + n) / (10 + n) over the updates n, so that the average forgets the random
    initial weights even in short runs. Buffers are copied.

    Args:
        model: the model to follow.
        decay: the decay per update once the warm-up reaches it, 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1.0 - decay)
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
