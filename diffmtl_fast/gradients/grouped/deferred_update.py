"""Lean memory: an operation's part of the update, formed from its saved tensors once the weights are known."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..rules import RuleContext
from ..stores import Deferred
from .delivery import Use, deliver


def deferred_part(use: Use, context: RuleContext, grad: Tensor, later: set[int]) -> Deferred:
    """Return what forms the update of some parameters from the operation's saved tensors and output gradient.

    Args:
        use: the operation.
        context: what its forward left.
        grad: of its output, with the plain loss.
        later: the positions of the parameters.
    """
    kept = copy.copy(context)
    kept.needs_input_grad = tuple(
        i in use.handles and not later.isdisjoint(use.handles[i].origins)
        for i in range(len(context.needs_input_grad))
    )

    def form(weights: Tensor) -> None:
        # Samples do not interact: the weighted loss's output gradient is the plain one's, row by row.
        by_row = use.layout.clusters.by_row(weights, grad.shape[0])
        weighted = (grad * by_row.view(-1, *[1] * (grad.dim() - 1))).to(grad.dtype)
        target = _Grads(use.engine.parameters)
        with torch.no_grad():
            deliver(use, kept, weighted, use.layout.whole, target, later.__contains__)

    return form


class _Grads:
    """The parameters' ``.grad`` as the target of an update [1, *shape]; see `Store` for the methods."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters

    def lend(self, position: int) -> Tensor | None:
        parameter = self._parameters[position]
        if parameter.grad is not None or not parameter.numel() or not parameter.is_contiguous():
            return None
        parameter.grad = torch.empty_like(parameter)
        return parameter.grad.unsqueeze(0)

    def accept(self, position: int) -> None:
        """Nothing to do: the lent memory is the ``.grad``."""

    def take_back(self, position: int) -> None:
        self._parameters[position].grad = None

    def add(self, position: int, gradients: Tensor) -> None:
        parameter = self._parameters[position]
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter).copy_(gradients[0])
        else:
            parameter.grad.add_(gradients[0])
