"""Stores the whole Jacobian, one gradient per cluster for every parameter, in memory reused at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ... import ops
from ...distributed.arrivals import Arrivals
from ...ops.gram import gram_at_any_scale
from .base import Deferred

_ALIGNMENT = 64  # elements from one parameter's block to the next are a multiple of this: whole cache lines


class Jacobian:
    """J as one block [K, *shape] for every parameter, all in one buffer.

    A row of a block lies in memory like its parameter. Whatever forms gradients borrows a block and writes them
    straight into it, or hands them over with `add` and `add_row`; see `Store`.

    Args:
        parameters: the trainable parameters, all on one device.
        num_clusters: K.
        dtype: of the stored gradients; default each parameter's own.

    Attributes:
        blocks: of every parameter, [K, *shape]; rows that nothing was written to hold anything, see `filled`.
        arrivals: hears of all gradients until `clear`, if somebody wants to know.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], num_clusters: int, dtype: torch.dtype | None = None
    ) -> None:
        self.parameters = parameters
        self.num_clusters = num_clusters
        self.blocks = _allocate(parameters, num_clusters, dtype)
        self.clear()

    def clear(self) -> None:
        """Forget the gradients of the last step; their memory is written over."""
        self._written = [[False] * self.num_clusters for _ in self.blocks]
        self._lent: set[int] = set()
        self._poisoned = False
        self.arrivals: Arrivals | None = None

    def poison(self) -> None:
        """Lend memory full of NaN until `clear`."""
        self._poisoned = True

    def lend(self, position: int) -> Tensor | None:
        """Lend a parameter's block if nothing of this step is in it yet, and it is contiguous."""
        block = self.blocks[position]
        if (
            position in self._lent
            or True in self._written[position]
            or not (block.is_contiguous() and block.numel())
        ):
            return None
        self._lent.add(position)
        return block.fill_(math.nan) if self._poisoned else block

    def accept(self, position: int) -> None:
        """Take the gradients that the lent block now holds."""
        self._lent.remove(position)
        self._written[position] = [True] * self.num_clusters
        self._tell(position)

    def take_back(self, position: int) -> None:
        """Take a lent block back that holds nothing of worth."""
        self._lent.remove(position)

    def add(self, position: int, gradients: Tensor) -> None:
        """Add the gradients [K, *shape] of a parameter; the block itself, where they were written there."""
        self._refuse_lent(position)
        block, written = self.blocks[position], self._written[position]
        if gradients is block:
            if any(written):
                raise RuntimeError(
                    f"parameter {position}: expected its block alone to be written, found others"
                )
        elif any(written):
            self.filled(position).add_(gradients)
        else:
            block.copy_(gradients)
        self._written[position] = [True] * self.num_clusters
        self._tell(position)

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Add the gradient [*shape] of a parameter for one cluster."""
        self._refuse_lent(position)
        row = self.blocks[position][k]
        if self._written[position][k]:
            row.add_(gradient)
        else:
            row.copy_(gradient)
        self._written[position][k] = True
        self._tell(position)

    def _tell(self, position: int) -> None:
        if self.arrivals is not None:
            self.arrivals.note(position)

    def _refuse_lent(self, position: int) -> None:
        if position in self._lent:
            raise RuntimeError(
                f"expected the block of parameter {position} back before other gradients are added to it, found "
                "it still lent"
            )

    # J itself forms the update: operations keep nothing for it, and nothing is differentiated again.
    keeps_graph = takes_offers = False

    def offer(
        self, positions: Collection[int], tensors: Sequence[Tensor], form: Callable[[set[int]], Deferred]
    ) -> None:
        """Decline."""

    @property
    def touched(self) -> list[bool]:
        """For every parameter, whether it got a gradient since `clear`."""
        return [any(written) for written in self._written]

    def gramian(self) -> Tensor:
        """Return J Jᵀ, float64 [K, K], at any scale."""
        blocks = []
        for position, written in enumerate(self._written):
            if any(written):
                blocks.append(self.filled(position))
        if not blocks:
            return self.blocks[0].new_zeros((self.num_clusters,) * 2, dtype=torch.float64)
        return gram_at_any_scale(blocks)

    def drop(self, clusters: Tensor) -> None:
        """Set the rows of some clusters, bool [K], to zero."""
        for block, reached in zip(self.blocks, self.touched, strict=True):
            if reached:
                block.masked_fill_(clusters.view(-1, *[1] * (block.dim() - 1)), 0)

    def matrix(self, out: Tensor | None = None) -> Tensor:
        """Return a copy of J as one matrix.

        Args:
            out: [n, P], n <= K: where the first n rows go; by default a new matrix [K, P] of all of them, in the
                dtype that the blocks promote to.
        """
        rows = self.num_clusters if out is None else len(out)
        parts = []
        for position, (block, reached) in enumerate(zip(self.blocks, self.touched, strict=True)):
            part = self.filled(position) if reached else torch.zeros_like(block)
            parts.append(part[:rows].reshape(rows, block[0].numel()))
        return torch.cat(parts, 1, out=out)

    def update(self, weights: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        """Add Σ_k w_k g_k to the parameters' ``.grad`` as autograd would, None where no gradient came.

        Returns:
            The squared norm of what is in ``.grad`` of all parameters afterwards.
        """
        touched = {i: self.blocks[i] for i, reached in enumerate(self.touched) if reached}
        return self.add_to_grads(touched, weights)

    def add_to_grads(self, blocks: Mapping[int, Tensor], weights: Tensor) -> Tensor:
        """Add the weighted sums of the rows of blocks to ``.grad``; see the function of this name."""
        return add_to_grads(self.parameters, blocks, weights)

    def dtype(self, position: int) -> torch.dtype:
        """Return the dtype of a parameter's stored gradients."""
        return self.blocks[position].dtype

    def row(self, position: int, k: int) -> Tensor | None:
        """Return the gradient of a parameter for one cluster, if it got one."""
        return self.blocks[position][k] if self._written[position][k] else None

    def filled(self, position: int) -> Tensor:
        """Return a parameter's block, after setting the rows that got no gradient to zero."""
        for k, written in enumerate(self._written[position]):
            if not written:
                self.blocks[position][k].zero_()
                self._written[position][k] = True
        return self.blocks[position]


def _allocate(
    parameters: Sequence[nn.Parameter], num_clusters: int, dtype: torch.dtype | None
) -> list[Tensor]:
    blocks: dict[int, Tensor] = {}
    for stored in dict.fromkeys(dtype or p.dtype for p in parameters):
        members = [i for i, p in enumerate(parameters) if (dtype or p.dtype) == stored]
        sizes = [-(-num_clusters * parameters[i].numel() // _ALIGNMENT) * _ALIGNMENT for i in members]
        buffer = torch.empty(sum(sizes), dtype=stored, device=parameters[members[0]].device)
        offset = 0
        for i, size in zip(members, sizes, strict=True):
            p = parameters[i]
            block = buffer.as_strided((num_clusters, *p.shape), (p.numel(), *dense_stride(p)), offset)
            # No view of the buffer: graphs of PyTorch 2.9 save blocks and refuse those that were written to since,
            # which for views is the buffer.
            blocks[i] = block.data
            offset += size
    return [blocks[i] for i in range(len(parameters))]


def add_to_grads(parameters: Sequence[nn.Parameter], blocks: Mapping[int, Tensor], weights: Tensor) -> Tensor:
    """Add the weighted sums of the rows of blocks, by position, to the ``.grad`` of their parameters.

    Returns:
        The squared norm of what is in ``.grad`` of all parameters afterwards.
    """
    squared = accumulate([parameters[i] for i in blocks], list(blocks.values()), weights)
    for position, parameter in enumerate(parameters):
        if parameter.grad is not None and position not in blocks:  # left there by an earlier backward
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
            squared = squared + norm.square()
    return squared


def accumulate(parameters: Sequence[nn.Parameter], blocks: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Add Σ_k w_k J_l[k] to every parameter's ``.grad`` and return the squared norm of the result."""
    if not parameters:
        return weights.new_zeros((), dtype=torch.float64)
    there = [p.grad is not None for p in parameters]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    grads = [p.grad for p in parameters if p.grad is not None]
    return ops.combine_(grads, blocks, weights, accumulate=there)


def dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's strides if they fill its memory without gaps, else contiguous ones."""
    return torch.empty_like(parameter, device="meta").stride()
