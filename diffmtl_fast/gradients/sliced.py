"""Slices: a module runs once per cluster, each time with parameter leaves of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from .layout import BatchLayout, cut, join, map_tensors
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


class Transposition:
    """Brings the samples to dimension 0 for modules of PyTorch that have them in dimension 1, and back.

    Recurrent layers have their states so, and, unless ``batch_first=True``, their sequences; so does
    `torch.nn.MultiheadAttention`. Both directions are the same.

    Args:
        module: any module; nothing is done for others.
    """

    def __init__(self, module: nn.Module) -> None:
        self._states = isinstance(module, nn.RNNBase)
        attention = isinstance(module, nn.MultiheadAttention)
        self._sequences = (self._states or attention) and not module.batch_first
        self._inputs = ("query", "key", "value") if attention else ("input",)
        self._needed = self._states or self._sequences

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Transpose the arguments of a call."""
        if not self._needed:
            return args, kwargs
        names = [*self._inputs, "hx"]
        named = dict(zip(names, args, strict=False))
        moved = {name: self._move(name, value) for name, value in (named | kwargs).items()}
        rest = args[len(named) :]
        return (*(moved[n] for n in named), *rest), {n: moved[n] for n in kwargs}

    def outputs(self, output: Any) -> Any:
        """Transpose what a call returned: a sequence, and the last state or the weights of attention."""
        if not self._needed or not isinstance(output, tuple):
            return output
        return self._move(self._inputs[0], output[0]), self._move("hx", output[1])

    def _move(self, name: str, value: Any) -> Any:
        wanted = self._states if name == "hx" else self._sequences and name in self._inputs
        return map_tensors(_transpose, value) if wanted else value


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1) if tensor.dim() == 3 else tensor
