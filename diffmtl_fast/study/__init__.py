"""The study: every method and clustering, the curriculum and its reverse, trained, measured and reported alike."""

from __future__ import annotations

from .plan import VARIANTS, Plan, Variant
from .runner import study

__all__ = ["VARIANTS", "Plan", "Variant", "study"]
