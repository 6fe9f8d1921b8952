"""The times of SD3 that gather around a mode, which a weight and a distribution of noise levels share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Until the share is known to the last bit of a float64.
_BISECTIONS = 60


def check_mode_scale(mode_scale: float) -> None:
    """Refuse a scale at which the time would not rise with its share."""
    if not -1.0 < mode_scale < 2.0 / (math.pi - 2.0):
        raise ValueError(f"mode_scale: expected above -1 and below 2 / (pi - 2), found {mode_scale}")


def mode_time(share: Tensor, mode_scale: float) -> Tensor:
    """The time below which a share of the times lies: 1 − u − mode_scale (cos²(π u / 2) − 1 + u), u = 1 − share.

    Source: Esser et al., ICML 2024, arXiv 2403.03206.
    """
    return share + mode_scale * (share - torch.sin(0.5 * math.pi * share) ** 2)


def mode_share(time: Tensor, mode_scale: float) -> Tensor:
    """The share of the times below a time, by bisection, float64."""
    time = time.double()
    low, high = torch.zeros_like(time), torch.ones_like(time)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        below = mode_time(middle, mode_scale) < time
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


def mode_density(time: Tensor, mode_scale: float) -> Tensor:
    """Probability per unit of time, float64."""
    share = mode_share(time, mode_scale)
    return 1.0 / (1.0 + mode_scale - 0.5 * math.pi * mode_scale * torch.sin(math.pi * share))
