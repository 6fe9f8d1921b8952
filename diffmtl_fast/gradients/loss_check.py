"""The check that each loss depends on its own sample's output alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch import factors, scale_of
from .independence import halves

_logger = logging.getLogger("diffmtl_fast")

_settings: dict[type, tuple[str, ...]] = {}  # of every type of node the attributes that hold no tensor


class LossCheck:
    """Refuses losses that depend on other samples' outputs, once for every kind of them.

    A kind is what determines the answer: the graph from the losses back to the outputs, with the shape and the
    settings of every operation in it (of a `torch.autograd.Function` only its name is known).
    """

    def __init__(self) -> None:
        self._known: set[Any] = set()

    def forget(self) -> None:
        """Check every kind again."""
        self._known.clear()

    def __call__(self, losses: Tensor, outputs: list[Tensor]) -> None:
        """Check losses.

        Args:
            losses: [B].
            outputs: of the model, from which they are computed.

        Raises:
            ValueError: a loss depends on the output of another sample.
        """
        size = losses.shape[0]
        outputs = [output for output in outputs if output.dim() and output.shape[0] == size]
        if not outputs or size == 1:
            return
        kind = (size, *(output.shape[1:] for output in outputs), *_graph(losses, outputs))
        if kind in self._known:
            return
        for chosen in halves(size):
            chosen = chosen.to(losses.device)
            try:
                slopes = torch.autograd.grad(
                    losses, outputs, chosen.to(losses.dtype), retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:  # losses that can be differentiated only once
                _logger.warning(
                    "ClusteredMTL: could not check that each loss depends on its own sample alone: %s", error
                )
                break
            for slope in slopes:
                # NaN is 0 times an overflow.
                if slope is not None and bool(slope.reshape(size, -1)[~chosen].nan_to_num(0).any()):
                    raise ValueError(
                        "loss: expected the loss of each sample to depend on that sample's output alone, found "
                        "that others' outputs change it (a mean over the batch? outputs with another dimension 0?)"
                    )
        self._known.add(kind)


def refuse_scaled(losses: Tensor) -> None:
    """Refuse losses that a GradScaler has scaled, and that were perhaps divided for accumulation since.

    Looks through all objects of the process where the losses are multiplied by a scalar tensor: for first steps.

    Raises:
        ValueError: they are such.
    """
    found, node = [], losses.grad_fn
    while node is not None and node.name() in ("MulBackward0", "DivBackward0"):
        found += [factor for factor in factors(node) if factor.dim() == 0]
        node = next((following for following, _ in node.next_functions if following is not None), None)
    if not found:
        return
    scalers = [each for each in gc.get_objects() if issubclass(type(each), torch.amp.GradScaler)]
    if any(scale_of(scaler) is factor for scaler in scalers for factor in found):
        raise ValueError(
            "loss: expected unscaled losses, whose gradients are weighed, found those of scaler.scale(loss); "
            "write mtl.backward(loss, scaler=scaler)"
        )


def _graph(losses: Tensor, outputs: list[Tensor]) -> Iterator[Any]:
    """Yield what is known of the operations between the outputs and the losses."""
    ends = {output.grad_fn for output in outputs}
    index: dict[Any, int] = {}
    waiting = [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in ends:
            yield None
        elif node in index:
            yield index[node]
        else:
            index[node] = len(index)
            yield node.name()
            yield from _values(node)
            waiting.extend(following for following, _ in node.next_functions)


def _values(node: Any) -> Iterator[Any]:
    """Yield an operation's settings, such as the dimension of a sum."""
    kind = type(node)
    if kind not in _settings:
        names = [name for name in dir(kind) if name.startswith("_saved_")]
        _settings[kind] = tuple(
            name for name in names if not hasattr(kind, f"_raw{name}")
        )  # that of a tensor
    for name in _settings[kind]:
        yield _hashable(getattr(node, name))


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    return tuple(_hashable(item) for item in value) if isinstance(value, tuple | list) else value
