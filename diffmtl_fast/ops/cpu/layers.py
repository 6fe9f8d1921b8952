"""Gradients of the parameters of layers, of every cluster or sample by itself, on the CPU."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..._native import _C
from ..._torch import onednn_multiplies
from .._checks import accumulation_dtype, host_offsets
from .._layout import ContiguousClusters, in_rows
from ..cluster_conv_wgrad import Geometry, multiply_by_library
from .handles import DTYPES, handle, optional_handle

# Channels in a group from which on a convolution's kernel is quicker where they lie next to each other.
_MANY_CHANNELS = 8


@functools.cache
def _library_multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch has fast products of these numbers on this processor; others are widened to float32."""
    return dtype.itemsize > 2 or (torch.backends.mkldnn.is_available() and onednn_multiplies(dtype))


def _longest_own(dtype: torch.dtype, out_dtype: torch.dtype) -> int:
    """Return up to how many rows a cluster is multiplied faster by our kernel than by PyTorch's library.

    Ours writes the result once and past the caches, which counts where there is little else to do; it multiplies
    everything in float32 at least, where the library may have an instruction for shorter numbers, and does not
    divide the rows into blocks.
    """
    if dtype.itemsize > 2 or not _library_multiplies(dtype):
        return 1024
    return 8 if out_dtype == dtype else 32  # the library's product has yet to be converted


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Put a batch of products into `out`, or add it, with PyTorch's library."""
    if not _library_multiplies(a.dtype):
        a, b = a.float(), b.float()
    if a.dtype != out.dtype:
        product = a @ b
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        out.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=out)


def _runs(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Give the runs of clusters of one size: the size and which clusters."""
    first = 0
    for size, run in itertools.groupby(sizes):
        last = first + len(list(run))
        yield size, slice(first, last)
        first = last


def cluster_wgrad_out(grad_out: Tensor, x: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Run `cluster_wgrad_out`."""
    if not out.numel():
        return
    longest = _longest_own(x.dtype, out.dtype)
    bounds = host_offsets(offsets, x.shape[0])
    sizes = [end - begin for begin, end in pairwise(bounds)]
    with ContiguousClusters(out, accumulate) as (result, add):
        if own := [(k, bounds[k], bounds[k + 1]) for k, size in enumerate(sizes) if size <= longest]:
            rows = in_rows(grad_out), in_rows(x)
            _C.cpu_cluster_wgrad(
                *map(handle, rows), own, *out.shape[1:], handle(result), add, torch.get_num_threads()
            )
        for size, run in _runs(sizes):
            if size > longest:
                span = slice(bounds[run.start], bounds[run.stop])
                a, b = (t[span].unflatten(0, (-1, size)) for t in (grad_out, x))
                _multiply(a.transpose(1, 2), b, result[run], add)


def _multiply_images(
    grad_out: Tensor, x: Tensor, bounds: Sequence[int], geometry: Geometry, out: Tensor, accumulate: bool
) -> None:
    """Form a convolution's gradients of all clusters by our kernel, for three spatial dimensions."""
    missing = 5 - x.dim()
    ones, zeros = [1] * missing, [0] * missing
    stride, padding, dilation, groups = geometry
    # Of a dimension with one output the stride means nothing; copies have the stride's residues side by side.
    stride = [step if size > 1 else 1 for step, size in zip(stride, grad_out.shape[2:], strict=True)]
    whole = ([*ones, *out.shape[3:]], [*ones, *stride], [*zeros, *padding], [*ones, *dilation])
    if out.shape[2] >= _MANY_CHANNELS:
        grad_out, x = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (grad_out, x))
    images = _images(grad_out), _images(x)
    with ContiguousClusters(out, accumulate, accumulation_dtype(x)) as (result, add):
        _C.cpu_cluster_conv_wgrad(
            *images, bounds, groups, whole, handle(result), add, torch.get_num_threads()
        )


def _images(tensor: Tensor) -> tuple[int, int, list[int], list[int]]:
    """Give a tensor to a kernel for three spatial dimensions."""
    missing = 5 - tensor.dim()
    shape = list(tensor.shape)
    strides = [stride if size > 1 else 1 for size, stride in zip(shape, tensor.stride(), strict=True)]
    shape[2:2], strides[2:2] = [1] * missing, [0] * missing
    return tensor.data_ptr(), DTYPES[tensor.dtype], shape, strides


def cluster_conv_wgrad_out(
    grad_out: Tensor, x: Tensor, offsets: Tensor, kernel_size: Sequence[int], *rest: Any
) -> None:
    """Run `cluster_conv_wgrad_out`."""
    *geometry, out, accumulate = rest
    bounds = host_offsets(offsets, x.shape[0])
    if not out.numel():
        return
    products = grad_out.numel() // grad_out.shape[1] * out.numel() // len(out) ** 2  # of a cluster
    short = x.dtype.itemsize == 2 and _library_multiplies(x.dtype)  # for which there may be an instruction
    multiply = multiply_by_library if short and products > 5_000_000 else _multiply_images
    multiply(grad_out, x, bounds, Geometry(*geometry), out, accumulate)


def cluster_sum_out(values: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Run `cluster_sum_out`."""
    bounds = host_offsets(offsets, values.shape[0])
    values = in_rows(values)
    with ContiguousClusters(out, accumulate) as (result, add):
        _C.cpu_cluster_sum(
            handle(values), bounds, values.shape[1], handle(result), add, torch.get_num_threads()
        )


def group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `group_norm_backward`."""
    grad, x, mean, rstd = grad.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    samples, channels = x.shape[:2]
    by_x = torch.empty_like(x)
    by_weight, by_bias = (torch.empty(samples, channels, dtype=torch.float64) for _ in range(2))
    if by_weight.numel():
        _C.cpu_group_norm_backward(
            *map(handle, (grad, x)),
            *((t.data_ptr(), DTYPES[t.dtype], 1) for t in (mean, rstd)),
            optional_handle(weight),
            samples,
            channels,
            math.prod(x.shape[2:]),
            mean.shape[1],
            handle(by_x),
            by_weight.data_ptr(),
            by_bias.data_ptr(),
            torch.get_num_threads(),
        )
    dtype = accumulation_dtype(x)
    return by_x, by_weight.to(dtype), by_bias.to(dtype)
