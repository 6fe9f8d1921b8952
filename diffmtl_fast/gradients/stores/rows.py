"""Stores the rows of the Jacobian that plain backwards leave, and memory for no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...distributed.arrivals import Arrivals
from .jacobian import add_to_grads


class Rows:
    """Rows of J as tensors of their own, one for every cluster and parameter that got a gradient.

    Args:
        parameters: the trainable parameters.
        num_clusters: K.
        dtype: of the stored gradients; default each parameter's own.

    Attributes:
        arrivals: hears of all gradients, if somebody wants to know.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], num_clusters: int, dtype: torch.dtype | None = None
    ) -> None:
        self.parameters = parameters
        self.num_clusters = num_clusters
        self._dtype = dtype
        self._rows: dict[tuple[int, int], Tensor] = {}
        self.arrivals: Arrivals | None = None

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Take the gradient [*shape] of a parameter for one cluster, or add it to what is there."""
        if (position, k) in self._rows:
            self._rows[position, k].add_(gradient)
        else:
            self._rows[position, k] = gradient.to(self._dtype or gradient.dtype)
        if self.arrivals is not None:
            self.arrivals.note(position)

    @property
    def touched(self) -> list[bool]:
        """For every parameter, whether it got a gradient."""
        reached = {position for position, _ in self._rows}
        return [position in reached for position in range(len(self.parameters))]

    def dtype(self, position: int) -> torch.dtype:
        """Return the dtype of a parameter's stored gradients."""
        return self._dtype or self.parameters[position].dtype

    def row(self, position: int, k: int) -> Tensor | None:
        """Return the gradient of a parameter for one cluster, if it got one."""
        return self._rows.get((position, k))

    def add_to_grads(self, blocks: Mapping[int, Tensor], weights: Tensor) -> Tensor:
        """Add the weighted sums of the rows of blocks to ``.grad``; see the function of this name."""
        return add_to_grads(self.parameters, blocks, weights)

    def items(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield every row with its parameter and its cluster."""
        for (position, k), row in self._rows.items():
            yield position, k, row
