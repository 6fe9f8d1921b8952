"""How tensors lie in memory, as far as the kernels care."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._checks import accumulation_dtype
from .philox import is_seed

# The memory formats other than row-major in which a sample's elements still lie together.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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
    if jacobian.is_contiguous() and out.is_contiguous():
        return jacobian
    strides, order = jacobian.stride()[1:], out.stride()
    if strides == order or _layout(out.shape, strides) == _layout(out.shape, order):
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


class ContiguousClusters:
    """Memory for a kernel's result, and whether to add to what is there; at the end the result is in `out`.

    The elements of a cluster lie in row-major order without gaps there, the clusters anywhere: `out` itself where
    it is so already and in the dtype that the kernel writes.

    Args:
        out: [K, ...].
        accumulate: whether the result is added to `out`.
        dtype: what the kernel writes; default any.
    """

    __slots__ = ("_accumulate", "_out", "_written")

    def __init__(self, out: Tensor, accumulate: bool, dtype: torch.dtype | None = None) -> None:
        self._out, self._accumulate, self._written = out, accumulate, out
        fits = out.is_contiguous() or out[0].is_contiguous()
        if not fits or (dtype is not None and dtype != out.dtype):
            self._written = torch.empty(out.shape, dtype=dtype or accumulation_dtype(out), device=out.device)

    def __enter__(self) -> tuple[Tensor, bool]:
        return self._written, self._accumulate and self._written is self._out

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is not None:
            return
        if self._written is not self._out:
            self._out.add_(self._written) if self._accumulate else self._out.copy_(self._written)
        torch.autograd.graph.increment_version(self._out)


def dense_outputs(out: Sequence[Tensor]) -> list[Tensor]:
    """Return dense tensors with the values of `out`: themselves where they are so already."""
    return [written if is_dense(written) else written.contiguous() for written in out]


def copy_back(dense: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Put what was written to `dense_outputs` into `out`."""
    for computed, written in zip(dense, out, strict=True):
        if written is not computed:
            written.copy_(computed)


def _sample_is_contiguous(tensor: Tensor) -> bool:
    """Whether the elements of a sample lie in row-major order without gaps; the samples may lie anywhere."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def in_one_order(*tensors: Tensor | None, strided: bool) -> tuple[list[Any], torch.memory_format]:
    """Bring the samples of all tensors into one order in memory, without a copy where they are so already.

    The first one decides; generated noise asks for the row-major order.

    Args:
        tensors: [B, ...] each, or the seed of noise; None stays None.
        strided: whether the samples of a tensor may lie anywhere; else they follow each other.
    """
    order = torch.contiguous_format
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            break
    else:  # the usual case, found without the generator that costs as much as a kernel's launch
        return list(tensors), order
    lead = tensors[0]
    channels_last = None if lead is None else _CHANNELS_LAST.get(lead.dim())
    seeded = any(t is not None and is_seed(t) for t in tensors)
    if lead is not None and channels_last is not None and not seeded:
        order = channels_last if lead.is_contiguous(memory_format=channels_last) else order

    def arranged(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or is_seed(tensor):
            return tensor
        if strided and order is torch.contiguous_format and _sample_is_contiguous(tensor):
            return tensor
        return tensor.contiguous(memory_format=order)

    return [arranged(t) for t in tensors], order
