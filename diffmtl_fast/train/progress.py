"""What the progress of training says."""

from __future__ import annotations

from typing import Any


def describe(line: dict[str, Any]) -> str:
    """The losses of a line of the history, and the phase of a curriculum, in words."""
    losses = " ".join("-" if loss is None else f"{loss:.3f}" for loss in line["losses"])
    phase = f"  phase {line['phase']}" if "phase" in line else ""
    return f"loss {line['loss']:.4f}  clusters {losses}{phase}"
