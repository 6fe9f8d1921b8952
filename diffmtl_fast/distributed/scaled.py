"""Gradients whose rows are read times factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..gradients.stores import Gradients


class Scaled:
    """Reads a store as if row k of J were times factor k.

    Args:
        store: what to read.
        factors: [K].
    """

    def __init__(self, store: Gradients, factors: Tensor) -> None:
        self._store, self._factors = store, factors

    def gramian(self) -> Tensor:
        """Return J Jᵀ, float64 [K, K], at any scale."""
        gramian = self._store.gramian()
        factors = self._factors.to(gramian.dtype)
        return gramian * factors * factors.unsqueeze(1)

    def drop(self, clusters: Tensor) -> None:
        """Set the gradients of some clusters, bool [K], to zero."""
        self._store.drop(clusters)

    def update(self, weights: Tensor, backward: Callable[[Tensor], None]) -> Tensor | None:
        """Add Σ_k w_k g_k to the parameters' ``.grad``; see `Gradients.update`."""
        return self._store.update(weights * self._factors.to(weights.dtype), backward)
