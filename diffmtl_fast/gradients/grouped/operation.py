"""One operation on parameters as the checks see it, and the exceptions for those that can't be run as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..rules import NoClusterRule


class Operation:
    """One use of parameters, for checks.

    Args:
        key: names it, and the shape of a sample's part in it; what was checked holds for all uses of this name.
        owners: the modules whose parameters they are.
        tensors: its other arguments.
        constant: whether these do not depend on parameters.
    """

    def __init__(
        self,
        key: tuple[Any, ...],
        owners: list[nn.Module],
        tensors: Iterable[Tensor] = (),
        constant: bool = False,
    ) -> None:
        self.key, self.owners = key, owners
        self.tensors, self.constant = list(tensors), constant


class CannotGroup(RuntimeError):
    """The model as a whole has to run in slices; says why."""


class NoRows(NoClusterRule):
    """An operation can't be grouped."""

    def __init__(self, operation: Operation, why: str) -> None:
        super().__init__(why)
        self.operation = operation


class Unseen(RuntimeError):
    """A Function was applied to parameters unseen; it can be seen from now on."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__(f"{function.__qualname__} takes a parameter")
        self.function = function


class Unverified(RuntimeError):
    """An operation came up that no check has seen; in a forward it is checked now."""

    def __init__(self, operation: str, owners: Iterable[str]) -> None:
        super().__init__(
            f"model: expected checkpoints to repeat operations of the forward, found {operation} of "
            f"{sorted(owners)} in the backward alone"
        )


class Differentiated(RuntimeError):
    """The model formed gradients in a check's forward, for which nothing was saved."""
