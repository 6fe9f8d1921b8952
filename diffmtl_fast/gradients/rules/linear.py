"""Rules of matrix products with a parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import unsafe_view
from ...ops.cluster_sum import cluster_sum_unchecked
from ...ops.cluster_wgrad import cluster_wgrad_unchecked
from ..batch import Clusters
from .autocast import lower_precision
from .registry import ClusterRule, NoClusterRule, RuleContext, register_cluster_rule


@register_cluster_rule(F.linear)
class Linear(ClusterRule):
    """y = x Wᵀ + b, x [..., in]."""

    precision = staticmethod(lower_precision)

    @staticmethod
    def forward(ctx: RuleContext, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `ClusterRule`."""
        if input.dim() < 2 or weight.dim() != 2 or weight.is_complex():
            raise NoClusterRule(
                f"linear: expected an input [B, ..., in] and a real weight [out, in], found {list(input.shape)}, "
                f"{list(weight.shape)} of {weight.dtype}"
            )
        ctx.save_for_backward(input, weight)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        rows, grad = as_rows(input), as_rows(grad)
        by_input, by_weight, by_bias = None, None, None
        if needed[0]:
            by_input = torch.mm(grad, weight)
            by_input = by_input if rows is input else by_input.view(input.shape)
        offsets = clusters.offsets(rows.shape[0])
        if needed[1]:
            by_weight = cluster_wgrad_unchecked(grad, rows, offsets, ctx.buffer(1))
        if needed[2]:
            by_bias = cluster_sum_unchecked(grad, offsets, ctx.buffer(2))
        return by_input, by_weight, by_bias


def as_rows(tensor: Tensor) -> Tensor:
    """Return [..., D] as [N, D]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


@register_cluster_rule(torch.matmul)
@register_cluster_rule(Tensor.matmul)
class Matmul(ClusterRule):
    """y = x W for a parameter W [in, out], x [..., in]."""

    precision = staticmethod(lower_precision)

    @staticmethod
    def forward(ctx: RuleContext, input: Tensor, other: Tensor) -> Tensor:
        """See `ClusterRule`."""
        if input.dim() < 2 or other.dim() != 2 or other.is_complex():
            raise NoClusterRule(
                f"matmul: expected [B, ..., in] times a real [in, out], found {list(input.shape)}, "
                f"{list(other.shape)} of {other.dtype}"
            )
        rows = as_rows(input)
        ctx.save_for_backward(rows, other)
        ctx.shape = input.shape
        product = torch.mm(rows, other)
        return product if rows is input else unsafe_view(product, [*input.shape[:-1], other.shape[1]])

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        rows, other = ctx.saved_tensors
        grad = as_rows(grad)
        by_input, by_other = None, None
        if ctx.needs_input_grad[0]:
            by_input = torch.mm(grad, other.t()).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            offsets = clusters.offsets(rows.shape[0])
            by_other = cluster_wgrad_unchecked(rows, grad, offsets, ctx.buffer(1))
        return by_input, by_other
