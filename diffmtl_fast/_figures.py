"""What all pictures share. Figures are made without pyplot, so that no window system or global state is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._extras import require

DPI = 150
# matplotlib's ten-colour cycle is qualitative; noise levels are ordered, so clusters take a sequential map.
COLOUR_MAP = "viridis"


def colours(count: int) -> list[Any]:
    """Colours of clusters in the order of their noise."""
    colour_map = require("matplotlib", "train").colormaps[COLOUR_MAP]
    return [colour_map(value) for value in np.linspace(0.0, 0.9, count)]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches."""
    return require("matplotlib.figure", "train").Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure to a picture file."""
    figure.savefig(path, dpi=DPI)


def smooth(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Mean over a row and its neighbours, NaN left out.

    Args:
        values: [N, ...].
        reach: neighbours on either side, fewer at the ends.
    """
    rows = np.arange(len(values))
    first, last = np.maximum(rows - reach, 0), np.minimum(rows + reach + 1, len(values))
    valid = np.isfinite(values)
    zeros = np.zeros((1, *values.shape[1:]))
    total = np.cumsum(np.concatenate([zeros, np.where(valid, values, 0.0)]), axis=0)
    count = np.cumsum(np.concatenate([zeros, valid]), axis=0)
    total, count = total[last] - total[first], count[last] - count[first]
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
