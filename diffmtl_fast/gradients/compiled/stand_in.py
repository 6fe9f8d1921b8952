"""What a compiled model finds in a parameter's place.

Both classes are tensor subclasses with nothing but ``__torch_function__``: the compiler follows their operations
into `dispatch`, and no subclass is left in the graph that it compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..._torch import DisableTorchFunctionSubclass, at_fixed_address, make_subclass
from ..batch import Clusters

_Operate: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

_operate: _Operate


def run_by(operate: _Operate) -> _Operate:
    """Run the operations on both classes by a function, which knows what they are."""
    global _operate
    _operate = operate
    return operate


class Dispatched(Tensor):
    """A tensor whose operations are run by `dispatch`.

    The compiler does not hand on a tensor's methods that are written in Python; the usual ones are functions here.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand the operation on."""
        return _operate(func, args, dict(kwargs or {}))

    def norm(self, *args: Any, **kwargs: Any) -> Any:
        """Call `torch.norm`."""
        return torch.norm(self, *args, **kwargs)

    def split(self, *args: Any, **kwargs: Any) -> Any:
        """Call `torch.split`."""
        return torch.split(self, *args, **kwargs)


class StandIn(Dispatched):
    """Stands for a parameter.

    Attributes:
        value: the parameter's values; requires no gradient.
        anchor: a scalar that requires a gradient, so that operations on constants have a backward, too. Its
            gradient is the number of operations that wrote to `block`.
        block: [K, *shape], where the backward of an operation writes the parameter's gradients of all clusters.
        accumulate: whether operations add to `block`, which several of them share, instead of overwriting it.
        uses: how many operations it took part in where they were not compiled.
    """

    value: Tensor
    anchor: Tensor
    block: Tensor
    accumulate: bool
    uses: int

    @staticmethod
    def make(value: Tensor, block: Tensor, accumulate: bool) -> StandIn:
        """Stand for a tensor; the stand-in shares its memory."""
        made: StandIn = make_subclass(StandIn, value.detach(), True)
        made.value, made.block = at_fixed_address(value.detach()), at_fixed_address(block)
        made.accumulate, made.uses = accumulate, 0
        made.anchor = torch.zeros((), device=value.device, requires_grad=True)
        return made


class Stacked(Dispatched):
    """A tensor computed from parameters alone, [K, *shape]: equal rows; their gradients are the clusters'."""


class Batch:
    """The batch of the forward that is running, as tensors: other clusters are no reason to compile again.

    Attributes:
        offsets: int64 [K + 1], where each cluster's samples begin and end, beside the parameters.
        host_offsets: the same on the CPU.
        cluster: int64 [B], the cluster of each sample, sorted, beside the parameters.
    """

    offsets: Tensor
    host_offsets: Tensor
    cluster: Tensor

    def set(self, clusters: Clusters, device: torch.device) -> None:
        """Take over the clusters of a sorted batch."""
        size = clusters.batch_size
        self.host_offsets = clusters.offsets(size).clone()  # the compiler wants no argument twice
        self.offsets = clusters.placed_offsets(size, device)
        self.cluster = clusters.by_row(torch.arange(clusters.num, device=device), size)


#: Read by compiled code. A thread runs one forward at a time, and so does the compiler.
batch = Batch()


def rows_of(stacked: Tensor) -> Tensor:
    """Return a `Stacked`'s rows as an ordinary tensor [K, *shape]."""
    with DisableTorchFunctionSubclass():
        return torch.Tensor.narrow(stacked, 0, 0, stacked.shape[0])


def first_of(stacked: Tensor) -> Tensor:
    """Return a `Stacked`'s value as an ordinary tensor [*shape]."""
    with DisableTorchFunctionSubclass():
        return torch.Tensor.select(stacked, 0, 0)
