"""``diffmtl-fast analyze``: each command is a function of `run.analyses`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..run import analyses

ANALYSES: dict[str, tuple[Callable[..., list[Path]], str]] = {
    "affinity": (analyses.affinity, "cosines between the gradients of all pairs of timesteps"),
    "negative-transfer": (
        analyses.negative_transfer,
        "what experts of an interval do better than the run",
    ),
    "difficulty": (
        analyses.difficulty,
        "how fast each interval is learned, and how far apart its levels lie",
    ),
}
