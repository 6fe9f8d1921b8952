"""Power averages of any width, made after training from snapshots of those that training kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._extras import require
from ..train.ema import exponent


def power_weights(
    times: NDArray[np.float64], gammas: NDArray[np.float64], time: float, gamma: float
) -> NDArray[np.float64]:
    """Weights of averages whose sum has the profile that is nearest to a wanted one, by least squares, [N].

    Source: see `diffmtl_fast.train.ema.PowerEma`; Eq. 5 and Algorithm 3.

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
