"""Per-cluster gradients for the price of one backward."""

from __future__ import annotations

from .clustered import ClusteredMTL, StepRecord

__all__ = ["ClusteredMTL", "StepRecord"]
