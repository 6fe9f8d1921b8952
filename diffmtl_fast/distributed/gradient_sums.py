"""Gradients of replicas without clusters, added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .arrivals import Arrivals, PlainArrivals, refuse_sparse
from .buckets import Departures, Workspace, in_order_of_backward
from .ranks import Ranks, Started


class GradientSums:
    """Adds up what a backward adds to the parameters' ``.grad`` on all ranks, in buckets, while it goes on.

    Args:
        parameters: the trainable parameters, without ``.grad``.
        ranks: the ranks.
        workspace: memory of the exchanges.
        arrivals: hears of the gradients.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], ranks: Ranks, workspace: Workspace, arrivals: PlainArrivals
    ) -> None:
        self._parameters, self._ranks, self._workspace = parameters, ranks, workspace
        self._plain = arrivals
        sizes = [(p.dtype, p.numel() * p.element_size()) for p in parameters]
        self._departures = Departures(in_order_of_backward(sizes), self._send)
        self._under_way: list[tuple[Sequence[int], Tensor, Started]] = []

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Send the gradients of the backward inside as soon as they are complete.

        Raises:
            ValueError: a gradient is sparse.
        """
        arrivals = Arrivals(self._plain.expected(self._parameters), self._departures.complete)

        def take(position: int, grad: Tensor) -> None:
            refuse_sparse(grad)
            arrivals.note(position)

        with self._plain.calling(self._parameters, take):
            yield

    def _send(self, positions: Sequence[int]) -> None:
        members = [self._parameters[position] for position in positions]
        sizes = [p.numel() for p in members]
        flat = self._workspace.take((sum(sizes),), members[0].dtype, self._ranks.device)
        for parameter, part in zip(members, flat.split(sizes), strict=True):
            if parameter.grad is None or parameter.grad.is_sparse:  # not used on this rank, or refused
                part.zero_()
            else:
                part.copy_(parameter.grad.reshape(-1))
        self._under_way.append((positions, flat, self._ranks.start_sum(flat)))

    def fail(self, error: Exception) -> None:
        """Tell the other ranks of an error in the backward, after the exchanges that they wait in.

        Raises:
            RuntimeError: always.
        """
        self._finish()
        nothing = [False] * len(self._parameters)
        self._ranks.add_with_flags(torch.zeros(0), nothing, f"{type(error).__name__}: {error}")

    def _finish(self) -> None:
        self._departures.flush()
        for _, _, exchange in self._under_way:
            exchange.wait()

    def finish(self) -> list[Tensor | None]:
        """Return the sum over the ranks of every parameter's gradient, None where no rank has one.

        Raises:
            RuntimeError: a rank failed in its backward.
        """
        self._finish()
        grads = [parameter.grad for parameter in self._parameters]
        _, reached = self._ranks.add_with_flags(torch.zeros(0), [grad is not None for grad in grads])
        for positions, flat, _ in self._under_way:
            sizes = [self._parameters[position].numel() for position in positions]
            for position, part in zip(positions, flat.split(sizes), strict=True):
                grad = grads[position]
                if reached[position]:
                    grad = torch.empty_like(self._parameters[position]) if grad is None else grad
                    grads[position] = grad.copy_(part.view(grad.shape))
            self._workspace.give_back(flat)
        return grads
