"""Slices: a module runs once per cluster, each time with parameter leaves of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from .layout import BatchLayout, cut, join
from .parameters import Slot, installed
from .receiver import Receiver


class Aliases(Sequence[Tensor]):
    """The leaves of one cluster: they share the parameters' memory, and their gradients are one row of J.

    Args:
        parameters: the trainable parameters.
        k: the cluster.
        receiver: what takes the gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], k: int, receiver: Receiver) -> None:
        self._parameters = parameters
        self._k = k
        self._receiver = receiver
        self._leaves: dict[int, Tensor] = {}  # made when asked for: a slice of one module needs few

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, position: int) -> Tensor:  # type: ignore[override]
        if position not in self._leaves:
            leaf = self._parameters[position].detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(self._hand_over(position))
            self._leaves[position] = leaf
        return self._leaves[position]

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves made so far."""
        return list(self._leaves.values())

    def _hand_over(self, position: int) -> Callable[[Tensor], None]:
        receiver, parameters, k = self._receiver, self._parameters, self._k

        def hook(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            if gradient is not None:
                receiver.add_row(parameters, position, k, gradient)

        return hook


def run_slices(
    forward: Callable[..., Any],
    slots: Sequence[Slot],
    aliases: Sequence[Aliases],
    layout: BatchLayout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    shared: Collection[str | int] = (),
    folded: bool = False,
) -> Any:
    """Run a module once for every present cluster, on its samples and with its leaves.

    Args:
        forward: the module's forward.
        slots: where its parameters are looked up.
        aliases: the leaves of every cluster.
        layout: the sorted batch.
        args: positional arguments; tensors of one row per sample in them, nested ones too, are cut.
        kwargs: keyword arguments, likewise.
        shared: positions and names of arguments that are not cut.
        folded: tensors may have several rows per sample.

    Returns:
        What the module returns for the whole batch.
    """
    size = layout.batch_size
    outputs, sizes = [], []
    for k, begin, end in layout.clusters.spans(size):
        part_args = tuple(
            a if i in shared else cut(a, size, begin, end, folded=folded) for i, a in enumerate(args)
        )
        part_kwargs = {
            n: a if n in shared else cut(a, size, begin, end, folded=folded) for n, a in kwargs.items()
        }
        with installed(slots, aliases[k]):
            outputs.append(forward(*part_args, **part_kwargs))
        sizes.append(end - begin)
    return join(outputs, sizes, folded=folded)
