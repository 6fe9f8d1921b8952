"""What all pictures share. Figures are made without pyplot, so that no window system or global state is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

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
