"""Storage of the Jacobian: per parameter one row of gradients for every cluster, kept over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import ops

_ALIGNMENT = 64  # elements from one parameter's block to the next are a multiple of this: whole cache lines


class Jacobian:
    """J as one block [K, *shape] for every parameter, all in one buffer.

    A row of a block lies in memory like its parameter. Whatever forms gradients writes them straight into a vacant
    block, or hands them over with `add` and `add_row`.

    Args:
        parameters: the trainable parameters, all on one device.
        num_clusters: K.
        dtype: of the stored gradients; default each parameter's own.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], num_clusters: int, dtype: torch.dtype | None = None
    ) -> None:
        self._num_clusters = num_clusters
        self.blocks = _allocate(parameters, num_clusters, dtype)
        self.clear()

    def clear(self) -> None:
        """Forget the gradients of the last step; their memory is written over."""
        self._written = [[False] * self._num_clusters for _ in self.blocks]

    def vacant(self, position: int) -> Tensor | None:
        """Return a parameter's block if nothing of this step is in it yet: who fills it passes it to `add`."""
        return None if any(self._written[position]) else self.blocks[position]

    def add(self, position: int, gradients: Tensor) -> None:
        """Add the gradients [K, *shape] of a parameter; they may be the vacant block itself."""
        block, written = self.blocks[position], self._written[position]
        if gradients is block:
            pass
        elif not any(written):
            block.copy_(gradients)
        else:
            self._fill(position)
            block.add_(gradients)
        self._written[position] = [True] * self._num_clusters

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Add the gradient [*shape] of a parameter for one cluster."""
        row = self.blocks[position][k]
        if self._written[position][k]:
            row.add_(gradient)
        else:
            row.copy_(gradient)
        self._written[position][k] = True

    # J itself forms the update, and operations keep nothing for it.
    defers = False

    def keeps(self, position: int, size: int) -> bool:
        """Keep every block."""
        return True

    def defer(self, part: Callable[[Tensor], None]) -> None:
        """Not called: see `defers`."""
        raise NotImplementedError

    @property
    def touched(self) -> list[bool]:
        """For every parameter, whether it got a gradient since `clear`."""
        return [any(written) for written in self._written]

    def gram(self) -> Tensor:
        """Return J Jᵀ, [K, K], float32 at least."""
        blocks = []
        for position, written in enumerate(self._written):
            if any(written):
                self._fill(position)
                blocks.append(self.blocks[position])
        if not blocks:
            return torch.zeros(self._num_clusters, self._num_clusters, device=self.blocks[0].device)
        return ops.gram(blocks)

    def matrix(self, out: Tensor | None = None) -> Tensor:
        """Return a copy of J as one matrix.

        Args:
            out: [n, P], n <= K: where the first n rows go; by default a new matrix [K, P] of all of them, in the
                dtype that the blocks promote to.
        """
        rows = self._num_clusters if out is None else len(out)
        parts = []
        for position, (block, reached) in enumerate(zip(self.blocks, self.touched, strict=True)):
            if reached:
                self._fill(position)
            part = block if reached else torch.zeros_like(block)
            parts.append(part[:rows].reshape(rows, block[0].numel()))
        return torch.cat(parts, 1, out=out)

    def combine_(self, parameters: Sequence[nn.Parameter], weights: Tensor) -> Tensor:
        """Add Σ_k w_k g_k to the parameters' ``.grad`` as autograd would, None where no gradient came.

        Returns:
            The squared norm of what is in ``.grad`` of all parameters afterwards.
        """
        touched = [i for i, reached in enumerate(self.touched) if reached]
        squared = accumulate([parameters[i] for i in touched], [self.blocks[i] for i in touched], weights)
        for parameter, reached in zip(parameters, self.touched, strict=True):
            if parameter.grad is not None and not reached:  # left there by an earlier backward
                wide = torch.promote_types(parameter.grad.dtype, torch.float32)
                squared = squared + torch.linalg.vector_norm(parameter.grad, dtype=wide).square().to(
                    squared.dtype
                )
        return squared

    def _fill(self, position: int) -> None:
        """Set the rows that got no gradient to zero."""
        for k, written in enumerate(self._written[position]):
            if not written:
                self.blocks[position][k].zero_()
                self._written[position][k] = True


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
            blocks[i] = buffer.as_strided((num_clusters, *p.shape), (p.numel(), *dense_stride(p)), offset)
            offset += size
    return [blocks[i] for i in range(len(parameters))]


def accumulate(parameters: Sequence[nn.Parameter], blocks: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Add Σ_k w_k J_l[k] to every parameter's ``.grad`` and return the squared norm of the result."""
    if not parameters:
        return weights.new_zeros(())
    there = [p.grad is not None for p in parameters]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    grads = [p.grad for p in parameters if p.grad is not None]
    return ops.combine_(grads, blocks, weights, accumulate=there)


def dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's strides if they fill its memory without gaps, else contiguous ones."""
    return torch.empty_like(parameter, device="meta").stride()
