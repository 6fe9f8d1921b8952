"""Rules of normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
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
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3)]

        def run(begin: int, end: int) -> tuple[Tensor | None, ...]:
            span = slice(begin, end)
            return _aten.native_layer_norm_backward(
                grad[span],
                input[span],
                ctx.shape,
                mean[span],
                rstd[span],
                weight,
                bias,
                wanted,
            )

        by_input, by_weight, by_bias = _norm_gradients(run, ctx, clusters, input, weight, bias, wanted)
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
            mean, rstd = (t.view(input.shape[0], -1) for t in (mean, rstd))
            by_samples, *affine = ops.group_norm_backward(grad, input, mean, rstd, weight)
            offsets = clusters.offsets(input.shape[0])
            by_cluster = [
                ops.cluster_sum(values, offsets, out=ctx.buffer(i)) if ctx.needs_input_grad[i] else None
                for i, values in zip((2, 3), affine, strict=True)
            ]
            return by_samples if ctx.needs_input_grad[0] else None, None, *by_cluster, None
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

        by_input, by_weight, by_bias = _norm_gradients(run, ctx, clusters, input, weight, bias, wanted)
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
        ctx.save_for_backward(input, weight)
        ctx.dims = list(range(-len(normalized_shape), 0))
        ctx.eps = torch.finfo(input.dtype).eps if eps is None else eps
        return F.rms_norm(input, list(normalized_shape), weight, eps)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight = ctx.saved_tensors
        dims = ctx.dims
        wide = torch.promote_types(input.dtype, torch.float32)
        rstd = (input.to(wide).square().mean(dims, keepdim=True) + ctx.eps).rsqrt()
        normal = input.to(wide) * rstd
        by_input, by_weight = None, None
        if ctx.needs_input_grad[0]:
            by_normal = grad.to(wide) * weight
            slope = (by_normal * normal).mean(dims, keepdim=True)
            by_input = (rstd * (by_normal - normal * slope)).to(input.dtype)
        if ctx.needs_input_grad[2]:
            rows = (grad.to(wide) * normal).reshape(-1, weight.numel())
            sums = ops.cluster_sum(rows, clusters.offsets(rows.shape[0]))
            by_weight = sums.view(clusters.num, *weight.shape)
        return by_input, None, by_weight, None


def _filled(buffer: Tensor | None, num: int, like: Tensor) -> Tensor:
    return like.new_empty(num, *like.shape) if buffer is None else buffer


def _norm_gradients(
    run: Callable[[int, int], tuple[Tensor | None, ...]],
    ctx: RuleContext,
    clusters: Clusters,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run a normalisation's backward cluster by cluster: one pass over the batch for all three gradients."""
    affine = [
        _filled(ctx.buffer(i), clusters.num, like) if wanted[i - 1] and like is not None else None
        for i, like in ((2, weight), (3, bias))
    ]
    rows = [[None] * clusters.num if gradients is None else gradients.unbind() for gradients in affine]
    parts = []
    begin = 0
    for size, *own in zip(clusters.sizes(input.shape[0]), *rows, strict=True):
        found: Sequence[Tensor | None] = run(begin, begin + size) if size else [None, None, None]
        begin += size
        parts.append(found[0])
        _put(own, found[1:])
    by_input = None
    if wanted[0]:
        there = [part for part in parts if part is not None]
        by_input = there[0] if len(there) == 1 else torch.cat(there)
    return by_input, affine[0], affine[1]


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
