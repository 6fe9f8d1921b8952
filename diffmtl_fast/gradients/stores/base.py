"""The interface of a store, which takes cluster gradients in backward and then forms Gramian and update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from torch import Tensor

#: Adds an operation's part of Σ_k w_k g_k to the parameters' .grad, given w [K].
Deferred = Callable[[Tensor], None]


class Gradients(Protocol):
    """Gradients of the clusters that are complete: what a step asks for, once, in this order."""

    def gramian(self) -> Tensor:
        """Return J Jᵀ, float64 [K, K], at any scale."""

    def drop(self, clusters: Tensor) -> None:
        """Set the gradients of some clusters, bool [K], to zero, after `gramian`."""

    def update(self, weights: Tensor, backward: Callable[[Tensor], None]) -> Tensor | None:
        """Add Σ_k w_k g_k to the parameters' ``.grad`` as autograd would.

        Args:
            weights: w, [K].
            backward: differentiates the loss whose samples are weighted by w, for stores that keep the graph.

        Returns:
            The squared norm of what is in ``.grad`` of all trainable parameters afterwards, where it is known.
        """


class Store(Gradients, Protocol):
    """What the graph calls during a backward, to be read afterwards.

    Parameters are named by their position in the list of trainable parameters.

    Attributes:
        keeps_graph: whether `update` differentiates once more, so that the backward has to keep its graph.
        takes_offers: whether it wants `offer` to be called.
    """

    keeps_graph: bool
    takes_offers: bool

    def clear(self) -> None:
        """Forget the gradients of the last backward."""

    def poison(self) -> None:
        """Lend memory full of NaN from now on until `clear`, so that a check finds who relies on what is in it."""

    def lend(self, position: int) -> Tensor | None:
        """Lend contiguous memory [K, *shape] to write a parameter's first gradients to, if there is any.

        It is the borrower's alone until `accept` or `take_back`; `add` in between is an error.
        """

    def accept(self, position: int) -> None:
        """Take a parameter's gradients, which the lent memory now holds."""

    def take_back(self, position: int) -> None:
        """Take lent memory back that holds nothing of worth."""

    def add(self, position: int, gradients: Tensor) -> None:
        """Add gradients [K, *shape] of a parameter."""

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Add the gradient [*shape] of a parameter for one cluster."""

    def offer(
        self, positions: Collection[int], tensors: Sequence[Tensor], form: Callable[[set[int]], Deferred]
    ) -> None:
        """Hear which parameters an operation is about to add gradients of, and what else could form their update.

        Args:
            positions: the parameters.
            tensors: the operation's tensors that would have to be kept for it.
            form: given some of the parameters, returns what forms their part of the update from these tensors.
        """
