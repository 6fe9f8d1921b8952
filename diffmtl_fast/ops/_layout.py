"""How tensors lie in memory, as far as the kernels care."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from ._checks import accumulation_dtype

# The memory formats other than row-major in which a sample's elements still lie together.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


# The dimensions that decide where an element lies, as (stride, size).
_Layout: TypeAlias = list[tuple[int, int]]


def _layout(shape: Sequence[int], strides: Sequence[int]) -> _Layout:
    return [(stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1]


def _is_dense(layout: _Layout) -> bool:
    expected = 1
    for stride, size in sorted(layout):
        if stride != expected:
            return False
        expected *= size
    return True


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory without gaps or overlaps, in whatever order."""
    return tensor.is_contiguous() or _is_dense(_layout(tensor.shape, tensor.stride()))


def as_matrix(jacobian: Tensor) -> Tensor:
    """Return J, [K, ...], as [K, P], in row-major order."""
    return jacobian.reshape(jacobian.shape[0], math.prod(jacobian.shape[1:]))


def dense_rows(jacobian: Tensor) -> Tensor:
    """Return J, [K, ...], with every row dense: itself where it is so already."""
    if jacobian.is_contiguous() or _is_dense(_layout(jacobian.shape[1:], jacobian.stride()[1:])):
        return jacobian
    return jacobian.contiguous()


def rows_like(jacobian: Tensor, out: Tensor) -> Tensor:
    """Return J, [K, ...], with the elements of every row in the order of the dense `out`, [...]."""
    strides, order = jacobian.stride()[1:], out.stride()
    if (
        strides == order
        or (jacobian.is_contiguous() and out.is_contiguous())
        or _layout(out.shape, strides) == _layout(out.shape, order)
    ):
        return jacobian
    rows = torch.empty_strided(
        jacobian.shape, (out.numel(), *order), dtype=jacobian.dtype, device=jacobian.device
    )
    return rows.copy_(jacobian)


def empty_row(jacobian: Tensor) -> Tensor:
    """Return uninitialised memory for one row of J, [K, ...], in the order of its rows."""
    if jacobian.is_contiguous() or jacobian.shape[0] == 0:
        return jacobian.new_empty(jacobian.shape[1:])
    return torch.empty_like(jacobian[0])


def in_rows(jacobian: Tensor) -> Tensor:
    """Return J with the elements of a row next to each other, itself where it is so already."""
    return jacobian if jacobian.shape[1] <= 1 or jacobian.stride(1) == 1 else jacobian.contiguous()


class Result:
    """A result with the strides of `like`, and the memory in the order of a kernel that the kernel writes to."""

    def __init__(self, like: Tensor, order: torch.memory_format) -> None:
        self._tensor = torch.empty_like(like)
        fits = self._tensor.is_contiguous(memory_format=order)
        self.written = self._tensor if fits else torch.empty_like(like, memory_format=order)

    def finish(self) -> Tensor:
        """Return the result, once `written` is."""
        return self._tensor if self.written is self._tensor else self._tensor.copy_(self.written)


@contextmanager
def contiguous_clusters(out: Tensor, accumulate: bool) -> Iterator[tuple[Tensor, bool]]:
    """Give memory for a kernel's result and whether to add to what is there; at the end the result is in `out`.

    The elements of a cluster lie in row-major order without gaps there, the clusters anywhere: `out` itself where
    it is so already.
    """
    if out[0].is_contiguous():
        yield out, accumulate
    else:
        result = torch.empty(out.shape, dtype=accumulation_dtype(out), device=out.device)
        yield result, False
        out.add_(result) if accumulate else out.copy_(result)
    torch.autograd.graph.increment_version(out)
