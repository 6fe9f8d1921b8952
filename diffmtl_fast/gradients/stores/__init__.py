"""Stores of cluster gradients: `Jacobian` keeps all, `LeanGramian` what is needed, `Rows` a few clusters'."""

from __future__ import annotations

from .base import Deferred, Gradients, Store
from .jacobian import Jacobian
from .lean_gramian import LeanGramian
from .rows import Rows

__all__ = ["Deferred", "Gradients", "Jacobian", "LeanGramian", "Rows", "Store"]
