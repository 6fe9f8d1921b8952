"""The Gramian and the update without the Jacobian: one operation's gradients at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .jacobian import accumulate, dense_stride

# Adds an operation's part of Σ_k w_k g_k to the parameters' .grad, given w.
Deferred = Callable[[Tensor], None]


_SHARED = (
    "memory='lean': expected no parameter to be shared by a module in slices and one that is not; "
    "use memory='full'"
)


class LeanGramian:
    """Adds up the Gramians of the parameters' blocks as they come, and keeps none of them.

    The update is formed afterwards. An output gradient of the weighted loss is one of the plain loss with every
    sample's rows times the weight of its cluster, because samples do not interact; so an operation that keeps its
    input and its output gradient can form its part of the update without another backward. What is kept so
    takes the place of the activations that the backward frees.

    A parameter that several operations use is kept until all of them have added their part; one whose gradients
    come row by row, from a module in slices, is kept to the end.

    Args:
        parameters: the trainable parameters.
        num_clusters: K.
        uses: how many operations of the forward each parameter took part in.
        defers: whether operations keep what forms the update. Where activations are recomputed or fetched in
            backward, to save memory, keeping them would undo that: the update takes a second backward instead.
        dtype: of the blocks while they are kept; default each parameter's own.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_clusters: int,
        uses: Mapping[int, int],
        defers: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._parameters = parameters
        self._num_clusters = num_clusters
        self._uses = Counter(uses)
        self.defers = defers
        self._dtype = dtype
        self._kept: dict[int, Tensor] = {}
        self._done: set[int] = set()
        self._lent: dict[int, Tensor] = {}
        self._free: list[Tensor] = []
        self._gramian: Tensor | None = None
        self._by_row: set[int] = set()
        self._deferred: list[Deferred] = []

    def defer(self, part: Deferred) -> None:
        """Keep what forms an operation's part of the update."""
        self._deferred.append(part)

    def combine_(self, parameters: Sequence[nn.Parameter], weights: Tensor) -> None:
        """Add Σ_k w_k g_k to the parameters' ``.grad``."""
        while self._deferred:
            self._deferred.pop()(weights)
        rows = sorted(self._by_row)
        accumulate([parameters[i] for i in rows], [self._kept[i] for i in rows], weights)

    def vacant(self, position: int) -> Tensor | None:
        """Lend memory until `add`; fresh memory for every layer would have to be mapped each time."""
        if self._uses[position] > 1 or position in self._kept or position in self._lent:
            return None
        parameter = self._parameters[position]
        self._lent[position] = memory = self._scratch(parameter)
        return self._block(memory, parameter)

    def add(self, position: int, gradients: Tensor) -> None:
        """Take gradients [K, *shape] of a parameter from one of its uses."""
        if position in self._done:
            raise RuntimeError(
                "memory='lean': expected the last use of a parameter to be known from the forward, found one more "
                "in the backward; checkpoint with use_reentrant=False, or use memory='full'"
            )
        if position in self._by_row:
            raise RuntimeError(_SHARED)
        if position in self._kept:
            gradients = self._kept[position].add_(gradients)
        self._uses[position] -= 1
        if self._uses[position] > 0:
            self._kept[position] = gradients
        else:
            self._kept.pop(position, None)
            self._done.add(position)
            self._take(gradients)
        if position in self._lent:
            self._free.append(self._lent.pop(position))

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Take the gradient [*shape] of a parameter for one cluster; `gram` counts it in."""
        if position in self._done:
            raise RuntimeError(_SHARED)
        if position not in self._kept:
            parameter = self._parameters[position]
            self._kept[position] = self._block(self._scratch(parameter).zero_(), parameter)
        self._by_row.add(position)
        self._kept[position][k] += gradient

    def gram(self) -> Tensor:
        """Return J Jᵀ, [K, K], float32 at least, after counting in whatever is kept."""
        for gradients in self._kept.values():
            self._take(gradients)
        self._free.clear()
        if self._gramian is None:
            return torch.zeros(self._num_clusters, self._num_clusters, device=self._parameters[0].device)
        return self._gramian

    def _take(self, gradients: Tensor) -> None:
        if self._dtype is not None:
            gradients = gradients.to(self._dtype)
        part = ops.gram([gradients])
        self._gramian = part if self._gramian is None else self._gramian + part

    def _scratch(self, parameter: nn.Parameter) -> Tensor:
        """Return memory for a block, of a finished layer where there is some."""
        size, dtype = self._num_clusters * parameter.numel(), self._dtype or parameter.dtype
        for i, memory in enumerate(self._free):
            if memory.numel() >= size and memory.dtype == dtype:
                return self._free.pop(i)
        return torch.empty(size, dtype=dtype, device=parameter.device)

    def _block(self, memory: Tensor, parameter: nn.Parameter) -> Tensor:
        return memory.as_strided(
            (self._num_clusters, *parameter.shape), (parameter.numel(), *dense_stride(parameter))
        )
