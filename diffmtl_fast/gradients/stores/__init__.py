"""Stores of cluster gradients: all of J, or no more of it than the Gramian and the update need."""

from __future__ import annotations

from .base import Deferred, Gradients, Store
from .jacobian import Jacobian
from .lean import LeanGramian

__all__ = ["Deferred", "Gradients", "Jacobian", "LeanGramian", "Store"]
