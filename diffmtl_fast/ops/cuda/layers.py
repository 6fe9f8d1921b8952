"""Gradients of the parameters of layers, for every cluster or sample, by Triton and PyTorch's libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...kernels import clusters as cluster_kernels
from ...kernels import group_norm as group_norm_kernels
from ...kernels import norm_rows as norm_rows_kernels
from ...kernels import settings
from .._checks import accumulation_dtype, host_offsets
from .._layout import ContiguousClusters, in_rows
from .._library import run_plain
from ..cluster_conv_wgrad import Geometry, multiply_by_library
from .launches import SUM_DTYPES
from .uploads import place_offsets


def _add_shares(parts: Tensor, out: Tensor, accumulate: bool) -> None:
    """Add up what the shares of every cluster have given, [shares, K, ...]."""
    size = out[0].numel()
    block, num_warps = settings.stream_settings(size)
    cluster_kernels._add_shares_kernel[settings.ceil_div(size, block), out.shape[0]](
        parts, out, parts.shape[0], size, out.stride(0), ADD=accumulate, BLOCK=block, num_warps=num_warps
    )


def _launch_in_shares(kernel: Callable[..., None], shares: int, out: Tensor, accumulate: bool) -> None:
    """Call `kernel(result, distance between clusters, distance between shares, whether to add to the result)`."""
    if shares == 1:
        kernel(out, out.stride(0), 0, accumulate)
        return
    parts = torch.empty(shares, *out.shape, dtype=accumulation_dtype(out), device=out.device)
    kernel(parts, parts.stride(1), parts.stride(0), False)
    _add_shares(parts, out, accumulate)


def cluster_sum_out(values: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Launch `cluster_sum_out`."""
    _, offsets = place_offsets(offsets, values)
    if out.numel() == 0:
        return
    values, (k, size) = in_rows(values), out.shape
    rows, block, shares, num_warps = settings.cluster_sum_settings(k, values.shape[0], size)

    def launch(result: Tensor, stride_cluster: int, stride_share: int, add: bool) -> None:
        cluster_kernels._cluster_sum_kernel[settings.ceil_div(size, block), k, shares](
            values,
            offsets,
            result,
            values.shape[0],
            size,
            values.stride(0),
            stride_cluster,
            stride_share,
            ADD=add,
            ACCUMULATE=SUM_DTYPES[accumulation_dtype(values)],
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
        )

    with ContiguousClusters(out, accumulate) as (result, add):
        _launch_in_shares(launch, shares, result, add)


def _batched(x: Tensor, bounds: Sequence[int] | None, out: Tensor) -> bool:
    """Whether one product of the BLAS library gives the weight gradients: it is faster than a kernel of ours.

    The host must know that the clusters have equal sizes, and the library must write the dtype of `out`.
    """
    if not x.is_cuda or bounds is None or x.shape[0] == 0:
        return False
    sizes = {end - begin for begin, end in pairwise(bounds)}
    written = {x.dtype}
    if torch.version.hip is None and x.dtype in (torch.bfloat16, torch.float16):
        written.add(torch.float32)
    return len(sizes) == 1 and out.dtype in written


def _batched_wgrad(grad_out: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """Multiply clusters of one size, with the precision that PyTorch's settings give to any linear layer."""
    left, right = (rows.unflatten(0, (out.shape[0], -1)) for rows in (grad_out, x))
    dtype: dict[str, Any] = {} if out.dtype == x.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.baddbmm(out, left.transpose(1, 2), right, **dtype, out=out)
    else:
        torch.bmm(left.transpose(1, 2), right, **dtype, out=out)


def cluster_wgrad_out(grad_out: Tensor, x: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    """Launch `cluster_wgrad_out`."""
    bounds, offsets = place_offsets(offsets, x)
    if out.numel() == 0:
        return
    if _batched(x, bounds, out):
        _batched_wgrad(grad_out, x, out, accumulate)
        return
    grad_out, x, (k, outputs, inputs) = in_rows(grad_out), in_rows(x), out.shape
    chosen = settings.wgrad_settings(k, x.shape[0], outputs, inputs, x.element_size())
    tiles = settings.ceil_div(outputs, chosen.outputs) * settings.ceil_div(inputs, chosen.inputs)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"

    def launch(result: Tensor, stride_cluster: int, stride_share: int, add: bool) -> None:
        cluster_kernels._cluster_wgrad_kernel[tiles, k, chosen.shares](
            grad_out,
            x,
            offsets,
            result,
            x.shape[0],
            outputs,
            inputs,
            grad_out.stride(0),
            x.stride(0),
            stride_cluster,
            stride_share,
            ADD=add,
            PRECISION="tf32" if tf32 else "ieee",
            ACCUMULATE=SUM_DTYPES[accumulation_dtype(x)],
            BLOCK_N=chosen.rows,
            BLOCK_O=chosen.outputs,
            BLOCK_I=chosen.inputs,
            num_warps=chosen.num_warps,
        )

    with ContiguousClusters(out, accumulate) as (result, add):
        _launch_in_shares(launch, chosen.shares, result, add)


def cluster_conv_wgrad_out(
    grad_out: Tensor, x: Tensor, offsets: Tensor, kernel_size: Sequence[int], *rest: Any
) -> None:
    """Run `cluster_conv_wgrad_out` by the library's convolutions, in the dtype of the inputs."""
    *geometry, out, accumulate = rest
    bounds = host_offsets(offsets, x.shape[0])
    multiply_by_library(grad_out, x, bounds, Geometry(*geometry), out, accumulate)


def group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `group_norm_backward`; without a mean, x was only divided."""
    if x.dtype == torch.float64:  # the kernel adds up in float32
        return run_plain("group_norm_backward", f"no kernel for {x.dtype}", grad, x, mean, rstd, weight)
    (samples, channels), size, groups = x.shape[:2], math.prod(x.shape[2:]), rstd.shape[1]
    by_x = x.new_empty(x.shape)
    by_weight, by_bias = (x.new_empty(samples, channels, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return by_x, by_weight.zero_(), by_bias.zero_()
    rows, block, num_warps = settings.group_norm_settings(channels // groups, size)
    group_norm_kernels._group_norm_backward_kernel[samples * groups,](
        grad.contiguous(),
        x.contiguous(),
        None if mean is None else mean.contiguous(),
        rstd.contiguous(),
        None if weight is None else weight.contiguous(),
        by_x,
        by_weight,
        by_bias,
        groups,
        channels // groups,
        size,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    return by_x, by_weight, by_bias


def _norm_rows_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor,
    affine: list[Tensor | None],
    accumulate: Sequence[bool],
) -> Tensor:
    """Launch `cluster_norm_backward` of rows, whose gradients `affine` has memory for with contiguous clusters."""
    num_rows, size = x.shape
    wide, k = accumulation_dtype(x), offsets.shape[0] - 1
    rows, block, shares, num_warps = settings.norm_rows_settings(k, num_rows, size, wide.itemsize)
    sums = affine
    if shares > 1:
        sums = [
            None if out is None else out.new_empty(shares, k, size, dtype=accumulation_dtype(out, x))
            for out in affine
        ]
    strides = [0 if part is None else part.stride(-2) for part in sums]
    adds = [add and shares == 1 for add in accumulate]
    by_x = x.new_empty(x.shape)
    norm_rows_kernels._norm_rows_backward_kernel[k, shares](
        grad.contiguous(),
        x.contiguous(),
        None if mean is None else mean.contiguous(),
        rstd.contiguous(),
        None if weight is None else weight.contiguous(),
        offsets,
        by_x,
        *sums,
        num_rows,
        size,
        *strides,
        k * size,
        ADD_WEIGHT=adds[0],
        ADD_BIAS=adds[1],
        ACCUMULATE=SUM_DTYPES[wide],
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )
    if shares > 1:
        for part, out, add in zip(sums, affine, accumulate, strict=True):
            if part is not None and out is not None:
                _add_shares(part, out, add)
    return by_x


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
    """Launch `cluster_norm_backward`: in one pass where rows fit the registers, else by sums of every sample."""
    size = x.shape[1]
    fits = settings.power_of_two(size) * accumulation_dtype(x).itemsize <= settings.MAX_NORM_BYTES
    if rstd.shape[1] > 1 or x.numel() != x.shape[0] * size or not size or not fits:
        by_x, *by_sample = group_norm_backward(grad, x, mean, rstd, weight)
        for values, out, add in zip(by_sample, (by_weight, by_bias), accumulate, strict=True):
            if out is not None:
                cluster_sum_out(values, offsets, out, add)
        return by_x
    _, offsets = place_offsets(offsets, x)
    with ExitStack() as written:
        affine, adds = [], []
        for out, add in zip((by_weight, by_bias), accumulate, strict=True):
            result, rest = (
                (None, False) if out is None else written.enter_context(ContiguousClusters(out, add))
            )
            affine.append(result)
            adds.append(rest)
        by_x = _norm_rows_backward(grad.flatten(1), x.flatten(1), mean, rstd, weight, offsets, affine, adds)
    return by_x.view(x.shape)
