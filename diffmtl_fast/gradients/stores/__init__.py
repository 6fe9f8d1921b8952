"""Stores of cluster gradients: `Jacobian` keeps all of them, `LeanGramian` only what is needed."""

from __future__ import annotations

from .base import Deferred, Gradients, Store
from .jacobian import Jacobian
from .lean_gramian import LeanGramian

__all__ = ["Deferred", "Gradients", "Jacobian", "LeanGramian", "Store"]
