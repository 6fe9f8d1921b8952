"""Figures as Markdown."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..clustering import IntervalClustering


def table(headers: list[str], rows: list[list[str]], *, numbers: bool = False) -> str:
    """A Markdown table; the columns after the first are aligned right if they are numbers."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(headers) - 1))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, rule, *rows])


def mean_sd(values: np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation of what is finite, the latter of two values or more."""
    known = values[np.isfinite(values)]
    if not known.size:
        return "–"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{known.mean():.{digits}f} ± {known.std(ddof=1):.{digits}f}"


def median(values: list[float]) -> str:
    """The median; – if it is not finite or there is none."""
    middle = float(np.median(values)) if values else float("inf")
    return f"{middle:.0f}" if np.isfinite(middle) else "–"


def intervals(clusters: IntervalClustering) -> str:
    """The first and last timestep of every cluster."""
    return ", ".join(timesteps(*edges) for edges in pairwise(clusters.boundaries.tolist()))


def timesteps(first: int, end: int) -> str:
    """The timesteps first … end - 1."""
    return str(first) if end - first == 1 else f"{first}–{end - 1}"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"
