"""Rules of matrix products with a parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ..._torch import unsafe_view
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
        if input.dim() < 2 or weight.dim() != 2:
            raise NoClusterRule(
                f"linear: expected an input [B, ..., in] and a weight [out, in], found {list(input.shape)}, "
                f"{list(weight.shape)}"
            )
        ctx.save_for_backward(input, weight)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight = ctx.saved_tensors
        rows, grad = (t if t.dim() == 2 else t.reshape(-1, t.shape[-1]) for t in (input, grad))
        by_input, by_weight, by_bias = None, None, None
        if ctx.needs_input_grad[0]:
            by_input = (grad @ weight).view(input.shape)
        offsets = clusters.offsets(rows.shape[0])
        if ctx.needs_input_grad[1]:
            by_weight = ops.cluster_wgrad(grad, rows, offsets, out=ctx.buffer(1))
        if ctx.needs_input_grad[2]:
            by_bias = ops.cluster_sum(grad, offsets, out=ctx.buffer(2))
        return by_input, by_weight, by_bias


@register_cluster_rule(torch.matmul)
@register_cluster_rule(Tensor.matmul)
class Matmul(ClusterRule):
    """y = x W for a parameter W [in, out], x [..., in]."""

    precision = staticmethod(lower_precision)

    @staticmethod
    def forward(ctx: RuleContext, input: Tensor, other: Tensor) -> Tensor:
        """See `ClusterRule`."""
        if input.dim() < 2 or other.dim() != 2:
            raise NoClusterRule(
                f"matmul: expected [B, ..., in] times [in, out], found {list(input.shape)}, {list(other.shape)}"
            )
        rows = input.reshape(-1, input.shape[-1])
        ctx.save_for_backward(rows, other)
        ctx.shape = input.shape
        return unsafe_view(rows @ other, [*input.shape[:-1], other.shape[1]])

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        rows, other = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        by_input, by_other = None, None
        if ctx.needs_input_grad[0]:
            by_input = (grad @ other.t()).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            by_other = ops.cluster_wgrad(rows, grad, clusters.offsets(rows.shape[0]), out=ctx.buffer(1))
        return by_input, by_other
