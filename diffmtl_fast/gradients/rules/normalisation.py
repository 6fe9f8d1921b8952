"""Rules of normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import fused_rms_norm
from ...ops.cluster_norm_backward import cluster_norm_backward_unchecked
from ..batch import Clusters
from .autocast import norm_precision
from .registry import ClusterRule, NoClusterRule, RuleContext, register_cluster_rule

_aten = torch.ops.aten


@register_cluster_rule(F.layer_norm)
class LayerNorm(ClusterRule):
    """Normalisation over the last dimensions, x [B, ..., *normalized_shape]."""

    precision = staticmethod(norm_precision)

    @staticmethod
    def forward(
        ctx: RuleContext,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """See `ClusterRule`."""
        if input.dim() == len(normalized_shape):
            raise NoClusterRule(f"layer_norm: expected an input [B, ...], found {list(input.shape)}")
        ctx.shape = list(normalized_shape)
        out, mean, rstd = torch.native_layer_norm(input, ctx.shape, weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight, bias, mean, rstd = ctx.saved_tensors
        by_input, by_weight, by_bias = _by_rows(ctx, grad, clusters, input, mean, rstd, weight, bias)
        return by_input, None, by_weight, by_bias, None


@register_cluster_rule(F.group_norm)
class GroupNorm(ClusterRule):
    """Normalisation over groups of channels, x [B, C, ...]."""

    precision = staticmethod(norm_precision)

    @staticmethod
    def forward(
        ctx: RuleContext,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """See `ClusterRule`."""
        batch, channels = input.shape[:2]
        ctx.shape = channels, math.prod(input.shape[2:]), num_groups
        input = dense(input)
        out, mean, rstd = torch.native_group_norm(
            input,
            weight,
            bias,
            batch,
            channels,
            ctx.shape[1],
            num_groups,
            eps,
        )
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight, bias, mean, rstd = ctx.saved_tensors
        if input.device.type in ("cpu", "cuda") and input.is_contiguous():
            by_input, by_weight, by_bias = _by_clusters(ctx, grad, clusters, input, mean, rstd, weight, bias)
            return by_input, None, by_weight, by_bias, None
        # PyTorch's CPU kernel for channels_last writes the input's gradient even where it was not asked for.
        wanted = [True, *(ctx.needs_input_grad[i] for i in (2, 3))]
        grad = grad.contiguous(memory_format=memory_format(input))

        def run(begin: int, end: int) -> tuple[Tensor | None, ...]:
            span = slice(begin, end)
            return _aten.native_group_norm_backward(
                grad[span],
                input[span],
                mean[span],
                rstd[span],
                weight,
                end - begin,
                *ctx.shape,
                wanted,
            )

        by_input, by_weight, by_bias = _one_by_one(run, ctx, clusters, input, weight, bias)
        return by_input if ctx.needs_input_grad[0] else None, None, by_weight, by_bias, None


@register_cluster_rule(F.rms_norm)
class RMSNorm(ClusterRule):
    """Division by the root mean square over the last dimensions, x [B, ..., *normalized_shape]."""

    precision = staticmethod(norm_precision)

    @staticmethod
    def forward(
        ctx: RuleContext,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor,
        eps: float | None = None,
    ) -> Tensor:
        """See `ClusterRule`."""
        if input.dim() == len(normalized_shape):
            raise NoClusterRule(f"rms_norm: expected an input [B, ...], found {list(input.shape)}")
        # PyTorch's fused kernel for GPUs takes one dtype.
        dtype = torch.promote_types(input.dtype, weight.dtype)
        out, rstd = fused_rms_norm(input.to(dtype), list(normalized_shape), weight.to(dtype), eps)
        ctx.save_for_backward(input, weight, rstd)
        return out.to(input.dtype)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight, rstd = ctx.saved_tensors
        by_input, by_weight, _ = _by_rows(ctx, grad, clusters, input, None, rstd, weight, None)
        return by_input, None, by_weight, None


# Of all three operations: input, weight and bias.
_INPUT, _WEIGHT, _BIAS = 0, 2, 3


def _by_rows(
    ctx: RuleContext,
    grad: Tensor,
    clusters: Clusters,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Form all gradients of a normalisation over the last dimensions, one or several."""
    shape, rows, parameter = input.shape, rstd.numel(), bias if weight is None else weight
    if input.dim() == 2:
        return _by_clusters(ctx, grad, clusters, input, mean, rstd, weight, bias)
    assert parameter is not None
    size = parameter.numel()  # there may be no rows
    grad, input = grad.reshape(rows, size), input.reshape(rows, size)
    mean, rstd = None if mean is None else mean.view(rows, 1), rstd.view(rows, 1)
    by_input, by_weight, by_bias = _by_clusters(ctx, grad, clusters, input, mean, rstd, weight, bias)
    return None if by_input is None else by_input.view(shape), by_weight, by_bias


def _by_clusters(
    ctx: RuleContext,
    grad: Tensor,
    clusters: Clusters,
    input: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Form all gradients of a normalisation of [N, C, ...] over groups of channels, for all clusters at once."""
    samples, channels = input.shape[:2]
    by_weight, by_bias = _block(ctx, _WEIGHT, weight, clusters.num), _block(ctx, _BIAS, bias, clusters.num)
    by_input = cluster_norm_backward_unchecked(
        grad,
        input,
        mean,
        rstd,
        None if weight is None else weight.reshape(channels),
        clusters.offsets(samples),
        None if by_weight is None else by_weight.view(clusters.num, channels),
        None if by_bias is None else by_bias.view(clusters.num, channels),
    )
    return by_input if ctx.needs_input_grad[_INPUT] else None, by_weight, by_bias


def _block(ctx: RuleContext, position: int, parameter: Tensor | None, num: int) -> Tensor | None:
    """Return row-major memory [K, *shape] for the gradients of a parameter, or None if they are not wanted."""
    if parameter is None or not ctx.needs_input_grad[position]:
        return None
    block = ctx.buffer(position)
    if block is None or (parameter.dim() > 1 and not block[0].is_contiguous()):
        return parameter.new_empty(num, *parameter.shape)
    return block


def _one_by_one(
    run: Callable[[int, int], tuple[Tensor | None, ...]],
    ctx: RuleContext,
    clusters: Clusters,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Form all gradients of a normalisation by PyTorch's backward of one cluster after the other."""
    affine = _block(ctx, _WEIGHT, weight, clusters.num), _block(ctx, _BIAS, bias, clusters.num)
    rows = [[None] * clusters.num if gradients is None else gradients.unbind() for gradients in affine]
    parts = []
    begin = 0
    for size, *own in zip(clusters.sizes(input.shape[0]), *rows, strict=True):
        found: Sequence[Tensor | None] = run(begin, begin + size) if size else [None, None, None]
        begin += size
        parts.append(found[0])
        _put(own, found[1:])
    there = [part for part in parts if part is not None]
    return there[0] if len(there) == 1 else torch.cat(there), *affine


def _put(rows: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Write the gradients of one cluster, zeros where there is none, to the rows that are wanted."""
    for row, gradient in zip(rows, gradients, strict=True):
        if row is not None:
            row.zero_() if gradient is None else row.copy_(gradient)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return the order of a tensor's elements in memory; that of dimensions, if it is none of the usual ones."""
    for order in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        fits = order is torch.contiguous_format or tensor.dim() == (4 if order is torch.channels_last else 5)
        if fits and tensor.is_contiguous(memory_format=order):
            return order
    return torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor without gaps in memory, itself where it has none."""
    return tensor.contiguous(memory_format=memory_format(tensor))
