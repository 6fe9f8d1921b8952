"""The Gramian without the Jacobian: one parameter's gradients at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .jacobian import dense_stride


class LeanGramian:
    """Adds up the Gramians of the parameters' blocks as they come, and keeps none of them.

    A parameter that several operations use is kept until all of them have added their part; so is one whose
    gradients come row by row.

    Args:
        parameters: the trainable parameters.
        num_clusters: K.
        uses: how many operations of the forward each parameter took part in.
        dtype: of the blocks while they are kept; default each parameter's own.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_clusters: int,
        uses: Counter[int],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._parameters = parameters
        self._num_clusters = num_clusters
        self._uses = Counter(uses)
        self._dtype = dtype
        self._kept: dict[int, Tensor] = {}
        self._done: set[int] = set()
        self._gramian: Tensor | None = None

    def vacant(self, position: int) -> Tensor | None:
        """There is no memory that outlives a layer."""
        return None

    def add(self, position: int, gradients: Tensor) -> None:
        """Take gradients [K, *shape] of a parameter from one of its uses."""
        if position in self._done:
            raise RuntimeError(
                "memory='lean': expected the last use of a parameter to be known from the forward, found one more "
                "in the backward; checkpoint with use_reentrant=False, or use memory='full'"
            )
        if position in self._kept:
            gradients = self._kept[position].add_(gradients)
        self._uses[position] -= 1
        if self._uses[position] > 0:
            self._kept[position] = gradients
        else:
            self._kept.pop(position, None)
            self._done.add(position)
            self._take(gradients)

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Take the gradient [*shape] of a parameter for one cluster; `finish` counts it in."""
        if position not in self._kept:
            parameter = self._parameters[position]
            self._kept[position] = (
                torch.zeros(0, dtype=self._dtype or gradient.dtype, device=gradient.device)
                .new_zeros(self._num_clusters * parameter.numel())
                .as_strided(
                    (self._num_clusters, *parameter.shape), (parameter.numel(), *dense_stride(parameter))
                )
            )
        self._kept[position][k] += gradient

    def gram(self) -> Tensor:
        """Return J Jᵀ, [K, K], float32 at least, after counting in whatever is kept."""
        for gradients in self._kept.values():
            self._take(gradients)
        self._kept.clear()
        if self._gramian is None:
            return torch.zeros(self._num_clusters, self._num_clusters, device=self._parameters[0].device)
        return self._gramian

    def _take(self, gradients: Tensor) -> None:
        if self._dtype is not None:
            gradients = gradients.to(self._dtype)
        part = ops.gram([gradients])
        self._gramian = part if self._gramian is None else self._gramian + part
