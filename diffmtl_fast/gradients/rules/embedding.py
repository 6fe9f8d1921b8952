"""The rule of tables that are looked up by indices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Clusters
from .registry import ClusterRule, NoClusterRule, RuleContext, register_cluster_rule

_aten = torch.ops.aten


@register_cluster_rule(F.embedding)
class Embedding(ClusterRule):
    """Rows of a table, looked up by indices [B, ...]."""

    @staticmethod
    def forward(
        ctx: RuleContext,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        """See `ClusterRule`."""
        if sparse or input.dim() == 0:
            raise NoClusterRule("embedding: no rule for sparse gradients or a single index")
        ctx.save_for_backward(input)
        ctx.shape = weight.shape
        ctx.padding_idx = padding_idx
        ctx.scale_grad_by_freq = scale_grad_by_freq
        return F.embedding(input, weight, None, max_norm, norm_type)  # max_norm writes to the weight, once

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        (index,) = ctx.saved_tensors
        entries, width = ctx.shape
        padding_idx = ctx.padding_idx
        if padding_idx is not None:
            grad = grad.masked_fill((index == padding_idx % entries).unsqueeze(-1), 0)
        if ctx.scale_grad_by_freq:  # by the whole batch's frequencies, as the plain model does
            counts = index.new_zeros(entries).index_add_(0, index.flatten(), torch.ones_like(index.flatten()))
            grad = grad / counts[index].unsqueeze(-1)
        # One table per cluster, one below the other: one deterministic kernel adds up all of them.
        tables_before = clusters.of_rows(index.shape[0], index.device) * entries
        shifted = index + tables_before.view(-1, *[1] * (index.dim() - 1))
        tables = _aten.embedding_dense_backward(grad, shifted, clusters.num * entries, -1, False)
        return None, tables.view(clusters.num, entries, width), None, None, None, None, None
