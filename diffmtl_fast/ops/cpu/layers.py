"""Gradients of the parameters of layers, of every cluster or sample by itself, on the CPU."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..._native import _C
from ..._torch import onednn_multiplies
from .._checks import accumulation_dtype, host_offsets
from .._layout import ContiguousClusters, in_rows
from ..cluster_conv_wgrad import Geometry, multiply_by_library
from .handles import DTYPES, handle, optional_handle

# Ways to a convolution's weight gradients: one grouped convolution, our kernel, one convolution per cluster.
_ConvWay: TypeAlias = Literal["groups", "kernel", "library"]


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
    longest, num_rows = _longest_own(x.dtype, out.dtype), x.shape[0]
    bounds = host_offsets(offsets, num_rows)
    # Of so few rows no cluster has more.
    sizes = [end - begin for begin, end in pairwise(bounds)] if num_rows > longest else []
    with ContiguousClusters(out, accumulate) as (result, add):
        if not sizes or min(sizes) <= longest:
            rows, values = in_rows(grad_out), in_rows(x)  # alive until the kernel has read them
            _, outputs, inputs = out.shape
            _C.cpu_cluster_wgrad(
                handle(rows),
                handle(values),
                bounds,
                longest,
                outputs,
                inputs,
                handle(result),
                add,
                torch.get_num_threads(),
            )
        for size, run in _runs(sizes):
            if size > longest:
                span = slice(bounds[run.start], bounds[run.stop])
                a, b = (t[span].unflatten(0, (-1, size)) for t in (grad_out, x))
                _multiply(a.transpose(1, 2), b, result[run], add)


def _conv_way(x: Tensor, sizes: Sequence[int], products: int, groups: int) -> _ConvWay:
    """Choose the fastest way, as measured beside oneDNN.

    Our kernel reads every channel of a group beside others, which suits no narrow groups. oneDNN may have an
    instruction for shorter numbers, but its calls take 0.1 ms; one call serves clusters of one size.

    Args:
        x: input.
        sizes: samples of every cluster.
        products: of numbers, in the average cluster.
        groups: into which the channels are divided.
    """
    if x.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return "kernel"
    if groups > 1 and x.shape[1] // groups < 16:
        return "groups" if len(set(sizes)) == 1 and sizes[0] and x.is_contiguous() else "library"
    by_library = x.dtype.itemsize == 2 and products > 16_000_000 and _library_multiplies(x.dtype)
    return "library" if by_library else "kernel"


def _multiply_in_groups(
    grad_out: Tensor, x: Tensor, bounds: Sequence[int], geometry: Geometry, out: Tensor, accumulate: bool
) -> None:
    """Form the gradients of clusters of one size as groups of one convolution, side by side in the channels."""
    num = len(bounds) - 1
    grad_out, x = (t.unflatten(0, (num, -1)).transpose(0, 1).flatten(1, 2) for t in (grad_out, x))
    found = x.new_empty(1, num * out.shape[1], *out.shape[2:])
    wider = geometry._replace(groups=num * geometry.groups)
    multiply_by_library(grad_out, x, [0, x.shape[0]], wider, found, False)
    out.add_(found.view_as(out)) if accumulate else out.copy_(found.view_as(out))


def _multiply_by_kernel(
    grad_out: Tensor, x: Tensor, bounds: Sequence[int], geometry: Geometry, out: Tensor, accumulate: bool
) -> None:
    """Form the gradients of all clusters by our kernel, for three spatial dimensions."""
    missing = 5 - x.dim()
    ones, zeros = [1] * missing, [0] * missing
    stride, padding, dilation, groups = geometry
    # Of a dimension with one output the stride means nothing; copies have the stride's residues side by side.
    stride = [step if size > 1 else 1 for step, size in zip(stride, grad_out.shape[2:], strict=True)]
    whole = ([*ones, *out.shape[3:]], [*ones, *stride], [*zeros, *padding], [*ones, *dilation])
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


_CONV_WAYS: dict[_ConvWay, Callable[..., None]] = {
    "groups": _multiply_in_groups,
    "kernel": _multiply_by_kernel,
    "library": multiply_by_library,
}


def cluster_conv_wgrad_out(
    grad_out: Tensor, x: Tensor, offsets: Tensor, kernel_size: Sequence[int], *rest: Any
) -> None:
    """Run `cluster_conv_wgrad_out`."""
    *options, out, accumulate = rest
    bounds, geometry = host_offsets(offsets, x.shape[0]), Geometry(*options)
    if out.numel():
        sizes = [end - begin for begin, end in pairwise(bounds)]
        products = grad_out.numel() // grad_out.shape[1] // len(sizes) * (out.numel() // len(sizes))
        multiply = _CONV_WAYS[_conv_way(x, sizes, products, geometry.groups)]
        multiply(grad_out, x, bounds, geometry, out, accumulate)


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


def _clusters_of(out: Tensor | None, accumulate: bool) -> AbstractContextManager[tuple[Tensor | None, bool]]:
    """Return memory for gradients, as `ContiguousClusters` does, or none where they are not wanted."""
    return nullcontext((None, False)) if out is None else ContiguousClusters(out, accumulate)


def cluster_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor,
    by_weight: Tensor | None,
    by_bias: Tensor | None,
    accumulate: Sequence[bool],
) -> Tensor:
    """Run `cluster_norm_backward`."""
    grad, x, rstd = grad.contiguous(), x.contiguous(), rstd.contiguous()
    mean = None if mean is None else mean.contiguous()
    bounds = host_offsets(offsets, x.shape[0])
    by_x = torch.empty_like(x)
    with (
        _clusters_of(by_weight, accumulate[0]) as (weights, add_to_weights),
        _clusters_of(by_bias, accumulate[1]) as (biases, add_to_biases),
    ):
        _C.cpu_cluster_norm_backward(
            handle(grad),
            handle(x),
            optional_handle(mean),
            handle(rstd),
            optional_handle(weight),
            bounds,
            x.shape[1],
            math.prod(x.shape[2:]),
            rstd.shape[1],
            handle(by_x),
            optional_handle(weights),
            add_to_weights,
            optional_handle(biases),
            add_to_biases,
            torch.get_num_threads(),
        )
    return by_x
