"""Gradients of replicas without clusters, added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ranks import Ranks


class GradientSums:
    """Adds up what a backward has left in the parameters' ``.grad``.

    Args:
        parameters: the trainable parameters.
        ranks: the ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self._parameters, self._ranks = parameters, ranks

    def fail(self, error: Exception) -> None:
        """Tell the other ranks of an error in the backward.

        Raises:
            RuntimeError: always.
        """
        nothing = [False] * len(self._parameters)
        self._ranks.add_with_flags(torch.zeros(0), nothing, f"{type(error).__name__}: {error}")

    def finish(self) -> list[Tensor | None]:
        """Return the sum over the ranks of every parameter's gradient, None where no rank has one."""
        grads = [parameter.grad for parameter in self._parameters]
        _, reached = self._ranks.add_with_flags(torch.zeros(0), [grad is not None for grad in grads])
        found = [
            (torch.zeros_like(parameter) if grad is None else grad) if there else None
            for parameter, grad, there in zip(self._parameters, grads, reached, strict=True)
        ]
        self._ranks.add_([grad for grad in found if grad is not None])
        return found
