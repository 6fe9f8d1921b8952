"""Where gradients go during a backward: to a Jacobian, cluster by cluster, or to the parameters as usual."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn


class Store(Protocol):
    """What takes per-cluster gradients: a `Jacobian`, or a `LeanGramian`."""

    def vacant(self, position: int) -> Tensor | None:
        """Return memory [K, *shape] to write a parameter's gradients to, if there is any."""

    def add(self, position: int, gradients: Tensor) -> None:
        """Take gradients [K, *shape] of a parameter."""

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Take the gradient [*shape] of a parameter for one cluster."""

    def keeps(self, position: int, size: int) -> bool:
        """Decide whether a parameter's block is kept, rather than an operation's tensors of `size` bytes."""

    @property
    def defers(self) -> bool:
        """Whether operations are to keep what forms their part of the update."""

    def defer(self, part: Callable[[Tensor], None]) -> None:
        """Keep what adds an operation's part of Σ_k w_k g_k to the parameters' .grad, given w."""


class Receiver:
    """The switch between the two, asked by everything in the graph that forms a parameter gradient.

    Attributes:
        store: what takes per-cluster gradients now; None in any backward but `ClusteredMTL.backward`'s own, where
            the graph behaves like the plain model's.
        bypassed: whether such another backward has come by since the last forward.
    """

    def __init__(self) -> None:
        self.store: Store | None = None
        self.bypassed = False

    @contextmanager
    def collecting(self, store: Store) -> Iterator[None]:
        """Send the gradients of the backward inside to `store`."""
        self.store = store
        try:
            yield
        finally:
            self.store = None

    def add_row(self, parameters: Sequence[nn.Parameter], position: int, k: int, gradient: Tensor) -> None:
        """Take the gradient of a parameter for one cluster."""
        if self.store is not None:
            self.store.add_row(position, k, gradient)
            return
        self.bypassed = True
        parameter = parameters[position]
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            with torch.no_grad():
                parameter.grad.add_(gradient)
