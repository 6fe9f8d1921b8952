"""The Gramian of a plain step, formed beside it: the step keeps the bits that it has without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..ops.gram import gram_at_any_scale
from .batch import BatchLayout
from .independence import is_measured
from .model_state import RandomState
from .trees import copied, flatten, map_tensors


class Repeat:
    """A forward of the plain model, to be repeated by an engine that tells the clusters apart.

    Args:
        model: the model, before its forward.
        layout: of the batch.
        args: of the forward.
        kwargs: likewise.

    Attributes:
        differs: whether another forward, in the order of clusters, would draw other random numbers for a sample.
    """

    differs = False

    def __init__(
        self, model: nn.Module, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        device = next(model.parameters()).device
        kind = device.type
        self._autocast = torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            torch.is_autocast_enabled(kind),
            torch.is_autocast_cache_enabled(),
        )
        self._layout = layout
        self._arguments = map_tensors(copied, (args, kwargs))
        self._random = RandomState(device)
        self._edges: list[Any] = []

    def note(self, output: Any) -> list[Tensor]:
        """Remember where losses will leave the model; returns the outputs that they can be differentiated by."""
        outputs = _outputs(output)
        self._edges = [get_gradient_edge(each) for each in outputs]
        self.differs = self._layout.order is not None and self._random.drawn
        return outputs

    def slopes(self, objective: Tensor) -> list[Tensor | None]:
        """Return the gradients of a scalar by the outputs; its graph stays."""
        return list(torch.autograd.grad(objective, self._edges, retain_graph=True, allow_unused=True))

    def objective(self, engine: Any, step: Any, slopes: list[Tensor | None]) -> Tensor:
        """Repeat the forward in a step; returns a scalar whose gradients by the outputs are the slopes."""
        self._random.restore()
        with self._autocast:
            outputs = _outputs(engine.forward(step, self._layout, *self._arguments))
        parts = [
            (each * slope).sum() for each, slope in zip(outputs, slopes, strict=True) if slope is not None
        ]
        return torch.stack(parts).sum()


def gramian_one_by_one(losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The Gramian, float64 [K, K], of the gradients of K scalars, by a backward for each; their graph stays."""
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    blocks = [
        torch.stack([torch.zeros_like(p) if g is None else g for g in gradients])
        for p, gradients in zip(parameters, zip(*rows, strict=True), strict=True)
    ]
    return gram_at_any_scale(blocks)


def _outputs(output: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(output)[0] if is_measured(leaf) and leaf.requires_grad]
