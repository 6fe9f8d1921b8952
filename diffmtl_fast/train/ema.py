"""Averages of a model's weights: one with a decay, and those of which any width is made after training."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from .._torch import foreach_lerp_
from ..distributed.fully_sharded import local

#: Folder of the snapshots among a run's checkpoints.
POWER_EMA = "power_ema"


class Ema:
    """A second model whose parameters follow the first's.

    The decay rises from 0 as (1 + n) / (10 + n) over the updates n, so that the average forgets the random
    initial weights even in short runs. Buffers are copied.

    Args:
        model: the model to follow.
        decay: the decay per update once the warm-up reaches it, 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = _copy(model)
        self.decay = decay
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        _follow(self.model, model, 1.0 - decay)


class PowerEma:
    """Averages θ̂(t) = ∫₀ᵗ p(τ) θ(τ) dτ under power functions p(τ) = (γ + 1) τ^γ / t^(γ+1), one for each width.

    In steps that is θ̂(t) = β θ̂(t − 1) + (1 − β) θ(t) with β = (1 − 1/t)^(γ+1). The relative width σ_rel is the
    standard deviation of p over t. Of what is saved of two widths on the way,
    `diffmtl_fast.run.power_average` makes any other.
    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, arXiv
    2312.02696, Eqs. 2 to 4 and Algorithm 1.

    Args:
        model: the model to follow.
        sigma_rels: relative widths.

    Attributes:
        models: the averages, in the order of the widths.
        updates: t.
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float]) -> None:
        self.models = nn.ModuleList([_copy(model) for _ in sigma_rels])
        self._exponents = [exponent(width) for width in sigma_rels]
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        for average, gamma in zip(self.models, self._exponents, strict=True):
            _follow(average, model, 1.0 - (1.0 - 1.0 / self.updates) ** (gamma + 1.0))


def exponent(sigma_rel: float) -> float:
    """γ of the power function whose relative width is σ_rel = (γ + 1)^½ (γ + 2)⁻¹ (γ + 3)^−½.

    Raises:
        ValueError: the width is not above 0 and below that of γ = 0, 1 / √12.
    """
    if not 0.0 < sigma_rel < 12.0**-0.5:
        raise ValueError(f"sigma_rel: expected more than 0 and less than {12.0**-0.5:.4f}, found {sigma_rel}")
    t = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, weight: float) -> None:
    """Move the parameters of an average towards a model's, and copy its buffers."""
    ours, theirs = ([local(p) for p in each.parameters()] for each in (average, model))
    foreach_lerp_(ours, theirs, weight)
    for buffer, other in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(other)
