"""Averages of a model's weights: one with a decay, and others of any width, put together after training."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._extras import require
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
    standard deviation of p over t. Of what is saved of two widths on the way, `power_average` makes any other.
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


def power_weights(
    times: NDArray[np.float64], gammas: NDArray[np.float64], time: float, gamma: float
) -> NDArray[np.float64]:
    """Weights of averages whose sum has the profile that is nearest to a wanted one, by least squares, [N].

    Source: see `PowerEma`; Eq. 5 and Algorithm 3.

    Args:
        times: t of the averages that there are, [N].
        gammas: their exponents, [N].
        time: t of the wanted one.
        gamma: its exponent.
    """

    def products(t: NDArray[np.float64], g: NDArray[np.float64]) -> NDArray[np.float64]:
        """Integrals of the averages' profiles times others', [N, M]."""
        a, b = times[:, None], gammas[:, None]
        ratio = (a / t) ** np.where(a < t, g, -b)
        return (b + 1.0) * (g + 1.0) * ratio / ((b + g + 1.0) * np.maximum(a, t))

    known = products(times, gammas)
    wanted = products(np.array([float(time)]), np.array([gamma]))[:, 0]
    scale = 1.0 / np.sqrt(known.diagonal())  # profiles of length 1 are conditioned better
    return scale * np.linalg.lstsq(known * scale[:, None] * scale, wanted * scale, rcond=None)[0]


def power_average(
    snapshots: Mapping[int, Path],
    sigma_rels: Sequence[float],
    time: int,
    sigma_rel: float,
    buffers: Collection[str] = (),
) -> dict[str, Tensor]:
    """The weights averaged with a relative width, from snapshots of averages with others.

    Args:
        snapshots: safetensors files of `PowerEma.models`, by t.
        sigma_rels: relative widths of the averages in them.
        time: t of the wanted average; later snapshots are left out.
        sigma_rel: its width.
        buffers: names of tensors that are no averages; they are as in the last snapshot.

    Returns:
        float64 tensors by name.

    Raises:
        ValueError: there is no snapshot, or the width is out of range.
    """
    used = {t: path for t, path in sorted(snapshots.items()) if t <= time}
    if not used:
        raise ValueError(f"sigma_rel: expected snapshots of iteration {time} or earlier, found none")
    gammas = [exponent(width) for width in sigma_rels]
    times, exponents = np.repeat([*map(float, used)], len(gammas)), np.tile(gammas, len(used))
    weights = power_weights(times, exponents, time, exponent(sigma_rel)).reshape(len(used), len(gammas))
    found: dict[str, Tensor] = {}
    for row, path in zip(weights, used.values(), strict=True):
        with require("safetensors", "train").safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                index, name = key.split(".", 1)
                tensor = file.get_tensor(key)
                if name in buffers:
                    found[name] = tensor
                else:
                    found[name] = row[int(index)] * tensor.double() + found.get(name, 0.0)
    return found


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, weight: float) -> None:
    """Move the parameters of an average towards a model's, and copy its buffers."""
    ours, theirs = ([local(p) for p in each.parameters()] for each in (average, model))
    foreach_lerp_(ours, theirs, weight)
    for buffer, other in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(other)
