"""`cluster_conv_wgrad`: the gradient of a convolution's weight, of every cluster of samples by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    accumulation_dtype,
    check_floating,
    check_offsets,
    check_out,
    check_same_device,
    host_offsets,
)
from ._library import call, define_op_with_out, refuse_autograd


class Geometry(NamedTuple):
    """A convolution but for its kernel's size, one number per spatial dimension."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def multiply_by_library(
    grad_out: Tensor, x: Tensor, bounds: Sequence[int], geometry: Geometry, out: Tensor, accumulate: bool
) -> None:
    """Put the weight gradients into `out`, or add them, by a call of PyTorch's convolutions for each cluster."""
    weight = x.new_empty(out.shape[1:])  # only its shape is read
    *options, groups = geometry
    transposed, output_padding = False, [0] * len(geometry.stride)
    for row, (begin, end) in zip(out.unbind(), pairwise(bounds), strict=True):
        if begin == end:
            if not accumulate:
                row.zero_()
            continue
        rows = grad_out[begin:end], x[begin:end]
        _, found, _ = torch.ops.aten.convolution_backward(
            *rows, weight, None, *options, transposed, output_padding, groups, [False, True, False]
        )
        row.add_(found) if accumulate else row.copy_(found)


def cluster_conv_wgrad_out_plain(
    grad_out: Tensor, x: Tensor, offsets: Tensor, kernel_size: Sequence[int], *rest: Any
) -> None:
    """Compute `cluster_conv_wgrad` by its definition, into `out`."""
    *geometry, out, accumulate = rest
    dtype, bounds = accumulation_dtype(grad_out, out), host_offsets(offsets, x.shape[0])
    multiply_by_library(grad_out.to(dtype), x.to(dtype), bounds, Geometry(*geometry), out, accumulate)


def _empty(
    grad_out: Tensor, x: Tensor, offsets: Tensor, kernel_size: Sequence[int], *geometry: Any
) -> Tensor:
    inputs = x.shape[1] // Geometry(*geometry).groups
    return x.new_empty([offsets.shape[0] - 1, grad_out.shape[1], inputs, *kernel_size])


_cluster_conv_wgrad, _cluster_conv_wgrad_out = define_op_with_out(
    "cluster_conv_wgrad(Tensor grad_out, Tensor x, Tensor offsets, int[] kernel_size, int[] stride, "
    "int[] padding, int[] dilation, int groups",
    plain=cluster_conv_wgrad_out_plain,
    empty=_empty,
)
refuse_autograd("cluster_conv_wgrad", "it is itself part of a backward pass; detach its inputs")


def cluster_conv_wgrad_unchecked(
    grad_out: Tensor,
    x: Tensor,
    offsets: Tensor,
    kernel_size: Sequence[int],
    geometry: Geometry,
    out: Tensor | None = None,
) -> Tensor:
    """Return `cluster_conv_wgrad` where no gradient is recorded, of arguments known to be as it expects."""
    if out is None:
        return call(_cluster_conv_wgrad, "cluster_conv_wgrad", grad_out, x, offsets, kernel_size, *geometry)
    call(
        _cluster_conv_wgrad_out,
        "cluster_conv_wgrad_out",
        grad_out,
        x,
        offsets,
        kernel_size,
        *geometry,
        out,
        False,
    )
    return out


def cluster_conv_wgrad(
    grad_out: Tensor,
    x: Tensor,
    offsets: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Weight gradient of a convolution per cluster, over one to three spatial dimensions.

    W_k[o, i, τ] = Σ_n Σ_p grad_out[n, o, p] x[n, i, stride · p + dilation · τ − padding] over the samples n of
    cluster k, with zeros outside of x.

    Args:
        grad_out: gradient by the layer's output, [N, O, ...], floating point; samples in the order of their
            clusters.
        x: the layer's input, [N, I, ...], in the same dtype.
        offsets: int64 [K + 1]; cluster k has the samples offsets[k] … offsets[k + 1] − 1, so that offsets[0] = 0
            and offsets[K] = N. They are read on the host.
        kernel_size: of the weight, one number or one per spatial dimension, as the next three.
        stride: of the convolution.
        padding: zeros on both sides of x.
        dilation: distance of the kernel's elements.
        groups: into which the channels are divided.
        out: [K, O, I / groups, *kernel_size], floating point, of any dtype and strides: where to put the result.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        [K, O, I / groups, *kernel_size], zeros for an empty cluster; `out`, or a new tensor in the dtype of the
        inputs. Sums are formed in float32 at least. Autocast does not change it. Where PyTorch's own convolutions
        do the work — on accelerators, and on the CPU for groups of few channels and for large products of 16-bit
        numbers that the processor has an instruction for — the result is rounded to the dtype of the inputs on
        its way into `out`, and whether the same inputs give the same bits is theirs to say. An element of x that
        is not finite may make all weights of its input channel, in its cluster, so.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices do not fit, offsets do not divide N samples, `out` overlaps itself, or
            `accumulate` without `out`.
        RuntimeError: with `out`, an input requires a gradient; without it, the same when one is computed.
    """
    check_floating(grad_out=grad_out, x=x)
    if grad_out.dtype != x.dtype:
        raise TypeError(f"expected grad_out and x of one dtype, found {grad_out.dtype} and {x.dtype}")
    spatial = x.dim() - 2
    if not 1 <= spatial <= 3 or grad_out.dim() != x.dim() or grad_out.shape[0] != x.shape[0]:
        raise ValueError(
            "expected grad_out [N, O, ...] and x [N, I, ...] with one to three spatial dimensions, "
            f"found {list(grad_out.shape)} and {list(x.shape)}"
        )
    check_same_device(grad_out=grad_out, x=x)
    check_offsets(offsets, x)
    kernel, stride = _each("kernel_size", kernel_size, spatial, 1), _each("stride", stride, spatial, 1)
    padding, dilation = _each("padding", padding, spatial, 0), _each("dilation", dilation, spatial, 1)
    expected = [
        (size + 2 * pad - gap * (width - 1) - 1) // step + 1
        for size, width, step, pad, gap in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    if list(grad_out.shape[2:]) != expected or min(expected) < 1:
        raise ValueError(f"grad_out: expected [N, O, {expected}] for this x, found {list(grad_out.shape)}")
    if groups < 1 or x.shape[1] % groups or grad_out.shape[1] % groups:
        raise ValueError(
            f"groups: expected a divisor of {grad_out.shape[1]} and {x.shape[1]} channels, found {groups}"
        )
    geometry = kernel, stride, padding, dilation, groups
    if out is None:
        if accumulate:
            raise ValueError("accumulate: expected an out to add to, found none")
        return _cluster_conv_wgrad(grad_out, x, offsets, *geometry)
    shape = (offsets.shape[0] - 1, grad_out.shape[1], x.shape[1] // groups, *kernel)
    check_out(out, shape, grad_out=grad_out, x=x)
    call(_cluster_conv_wgrad_out, "cluster_conv_wgrad_out", grad_out, x, offsets, *geometry, out, accumulate)
    return out


def _each(name: str, value: int | Sequence[int], spatial: int, least: int) -> list[int]:
    values = [value] * spatial if isinstance(value, int) else list(value)
    if len(values) != spatial or min(values) < least:
        raise ValueError(f"{name}: expected {spatial} numbers ≥ {least}, found {values}")
    return values
