"""Slices: a module is run once per cluster, each time with tensors of that cluster in the parameters' places.

These share the parameters' memory, and their gradients are the cluster's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .batch import BatchLayout
from .model_state import written_once
from .parameters import Slot, installed
from .step import Step
from .trees import cut, join, map_tensors


class Aliases(Sequence[Tensor]):
    """Stand-ins of the parameters for one cluster: leaves in the same memory, whose gradients are a row of J.

    In any backward but `ClusteredMTL.backward`'s own their gradients are added to the parameters' ``.grad``, as in
    the plain model.

    Args:
        parameters: the trainable parameters, or other values of them.
        names: their names, for messages.
        k: the cluster.
        step: returns the step that a backward belongs to.
    """

    def __init__(
        self, parameters: Sequence[Tensor], names: Sequence[str], k: int, step: Callable[[], Step]
    ) -> None:
        self._parameters, self._names, self._k, self._step = parameters, names, k, step
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
    def made(self) -> list[Tensor]:
        """The leaves made so far."""
        return list(self._leaves.values())

    def _hand_over(self, position: int) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            if gradient is not None:
                self._take(position, gradient)

        return hook

    def _take(self, position: int, gradient: Tensor) -> None:
        if gradient.is_sparse:
            raise RuntimeError(
                f"model: expected dense gradients, found a sparse one of '{self._names[position]}'; make its "
                "embedding with sparse=False"
            )
        step = self._step()
        if step.store is not None:
            step.store.add_row(position, self._k, gradient)
            return
        step.bypassed = True
        parameter = self._parameters[position]
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            with torch.no_grad():
                parameter.grad.add_(gradient)


def run_slices(
    forward: Callable[..., Any],
    slots: Sequence[Slot],
    aliases: Sequence[Sequence[Tensor]],
    layout: BatchLayout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    shared: Collection[str | int] = (),
    folded: bool = False,
    writes: bool = False,
) -> Any:
    """Run a module once for every present cluster, on its samples and with its stand-ins of the parameters.

    Args:
        forward: the module's forward.
        slots: where its parameters are looked up.
        aliases: the stand-ins of the parameters for every cluster.
        layout: the sorted batch.
        args: positional arguments; tensors of one row per sample in them, nested ones too, are cut.
        kwargs: keyword arguments, likewise.
        shared: positions and names of arguments that are not cut.
        folded: tensors may have several rows per sample.
        writes: the module writes its own parameters: let the first slice do so, and none after it.

    Returns:
        What the module returns for the whole batch.
    """
    size = layout.batch_size
    outputs: list[Any] = []
    sizes: list[int] = []
    for k, begin, end in layout.clusters.spans(size):
        part_args = tuple(
            a if i in shared else cut(a, size, begin, end, folded=folded) for i, a in enumerate(args)
        )
        part_kwargs = {
            n: a if n in shared else cut(a, size, begin, end, folded=folded) for n, a in kwargs.items()
        }
        again = writes and outputs
        with installed(slots, aliases[k]), written_once(_used(aliases[k], slots)) if again else nullcontext():
            outputs.append(forward(*part_args, **part_kwargs))
        sizes.append(end - begin)
    return join(outputs, sizes, folded=folded)


def _used(aliases: Sequence[Tensor], slots: Sequence[Slot]) -> list[Tensor]:
    return [aliases[position] for position in {slot.position for slot in slots}]


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
