"""A store that saves memory: adds up the Gramian parameter by parameter, and keeps what the update needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...ops.gram import gram_at_any_scale
from .base import Deferred
from .jacobian import accumulate, dense_stride


class LeanGramian:
    """Adds up the Gramians of the parameters' blocks as they come, and keeps as little as it can for the update.

    The update is formed once the weights are known. An output gradient of the weighted loss is one of the plain
    loss with every sample's rows times the weight of its cluster, because samples do not interact. So an
    operation that keeps its input and its output gradient can form its part of the update without another
    backward. A parameter's block is kept instead where it is smaller than these, or is not complete after one
    operation: one of a parameter that several operations use, or of a module in slices. Either takes the place of
    activations that the backward frees.

    Args:
        parameters: the trainable parameters.
        num_clusters: K.
        uses: how many operations of the forward each parameter took part in.
        by_row: the parameters of modules in slices.
        keeps_graph: whether the update takes a second backward instead of what operations keep for it. Where
            activations are recomputed or fetched in backward, to save memory, keeping them would undo that.
        dtype: of the blocks while they are kept; default each parameter's own.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_clusters: int,
        uses: Mapping[int, int],
        by_row: Collection[int],
        keeps_graph: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._parameters = parameters
        self._memory = {parameter.data_ptr() for parameter in parameters}  # kept anyway
        self._num_clusters = num_clusters
        self._uses = Counter(uses)
        self.keeps_graph, self.takes_offers = keeps_graph, not keeps_graph
        self._dtype = dtype
        self._kept: dict[int, Tensor] = {}
        self._by_row = frozenset(by_row)
        self._keeping: set[int] = set()
        self._done: set[int] = set()
        self._lent: dict[int, Tensor] = {}
        self._free: list[Tensor] = []  # memory of finished blocks: mapping fresh memory each time is slow
        self._gramian: Tensor | None = None
        self._poisoned = False
        self._deferred: list[Deferred] = []

    def clear(self) -> None:
        """Nothing to forget: every backward has a store of its own."""

    def poison(self) -> None:
        """Lend memory full of NaN."""
        self._poisoned = True

    def offer(
        self, positions: Collection[int], tensors: Sequence[Tensor], form: Callable[[set[int]], Deferred]
    ) -> None:
        """Keep an operation's tensors for the parameters whose blocks are larger than these."""
        size = sum(t.numel() * t.element_size() for t in tensors if t.data_ptr() not in self._memory)
        later = {position for position in positions if not self._keeps(position, size)}
        if later:
            self._deferred.append(form(later))

    def _keeps(self, position: int, size: int) -> bool:
        """Decide whether a parameter's block is kept, rather than an operation's tensors of `size` bytes."""
        parameter = self._parameters[position]
        dtype = self._dtype or parameter.dtype
        if self._uses[position] > 1 or self._num_clusters * parameter.numel() * dtype.itemsize <= size:
            self._keeping.add(position)
        return position in self._keeping or position in self._by_row

    def lend(self, position: int) -> Tensor | None:
        """Lend memory for a block."""
        if self._uses[position] > 1 or position in self._lent or position in self._by_row:
            return None
        parameter = self._parameters[position]
        if not parameter.numel() or not parameter.is_contiguous():
            return None
        memory = self._scratch(parameter)
        block = self._block(memory, parameter)
        self._lent[position] = memory
        return block.fill_(math.nan) if self._poisoned else block

    def accept(self, position: int) -> None:
        """Take the gradients that the lent memory now holds."""
        memory = self._lent.pop(position)
        self._take_part(position, self._block(memory, self._parameters[position]))
        if position not in self._keeping:
            self._free.append(memory)

    def take_back(self, position: int) -> None:
        """Take lent memory back that holds nothing of worth."""
        self._free.append(self._lent.pop(position))

    def add(self, position: int, gradients: Tensor) -> None:
        """Take gradients [K, *shape] of a parameter from one of its uses."""
        if position in self._by_row:
            self._rows(position).add_(gradients)
        else:
            self._take_part(position, gradients)

    def _take_part(self, position: int, gradients: Tensor) -> None:
        if position in self._done:
            raise RuntimeError(
                "memory='lean': expected the last use of a parameter to be known from the forward, found one more "
                "in the backward; checkpoint with use_reentrant=False, or use memory='full'"
            )
        if position in self._kept:
            gradients = self._kept[position] + gradients  # not in place: parameters may share one tensor
        self._uses[position] -= 1
        unfinished = self._uses[position] > 0
        if not unfinished:
            self._done.add(position)
            self._take(gradients)
        if unfinished or position in self._keeping:
            self._kept[position] = gradients if self._dtype is None else gradients.to(self._dtype)
        else:
            self._kept.pop(position, None)

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Take the gradient [*shape] of a parameter for one cluster; `gramian` counts it in."""
        self._rows(position)[k].add_(gradient)

    def gramian(self) -> Tensor:
        """Return J Jᵀ, float64 [K, K], at any scale, when all gradients have come."""
        for position in sorted(
            self._kept.keys() - self._done
        ):  # in slices, or no gradient came to some of the uses
            self._done.add(position)
            self._take(self._kept[position])
        self._free.clear()
        if self._gramian is None:
            return self._parameters[0].new_zeros((self._num_clusters,) * 2, dtype=torch.float64)
        return self._gramian

    def drop(self, clusters: Tensor) -> None:
        """Refuse: what operations keep for the update does not tell the clusters apart."""
        raise NotImplementedError("memory='lean' drops no clusters")

    def update(self, weights: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Add Σ_k w_k g_k to the parameters' ``.grad``; its norm is not known."""
        if self.keeps_graph:
            self._kept.clear()
            backward(weights)
            return
        while self._deferred:
            self._deferred.pop()(weights)
        kept = sorted(self._kept)
        accumulate([self._parameters[i] for i in kept], [self._kept[i] for i in kept], weights)
        self._kept.clear()

    def _rows(self, position: int) -> Tensor:
        if position not in self._kept:
            parameter = self._parameters[position]
            self._kept[position] = self._block(self._scratch(parameter).zero_(), parameter)
        return self._kept[position]

    def _take(self, gradients: Tensor) -> None:
        if self._dtype is not None:
            gradients = gradients.to(self._dtype)
        part = gram_at_any_scale([gradients])
        self._gramian = part if self._gramian is None else self._gramian + part

    def _scratch(self, parameter: nn.Parameter) -> Tensor:
        """Return memory for a block, of a finished one where it fits."""
        size, dtype = self._num_clusters * parameter.numel(), self._dtype or parameter.dtype
        for i, memory in enumerate(self._free):
            if size <= memory.numel() <= 2 * size and memory.dtype == dtype:
                return self._free.pop(i)
        return torch.empty(size, dtype=dtype, device=parameter.device)

    def _block(self, memory: Tensor, parameter: nn.Parameter) -> Tensor:
        return memory.as_strided(
            (self._num_clusters, *parameter.shape), (parameter.numel(), *dense_stride(parameter))
        )
