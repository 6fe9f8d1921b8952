"""``diffmtl-fast analyze``: each command is a function of `analysis.run_analysis`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..analysis import run_analysis

ANALYSES: dict[str, tuple[Callable[..., list[Path]], str]] = {
    "affinity": (run_analysis.affinity, "cosines between the gradients of all pairs of timesteps"),
    "negative-transfer": (
        run_analysis.negative_transfer,
        "what experts of an interval do better than the run",
    ),
    "difficulty": (
        run_analysis.difficulty,
        "how fast each interval is learned, and how far apart its levels lie",
    ),
}
