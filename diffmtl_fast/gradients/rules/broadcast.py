"""The rule of a parameter that is broadcast over the batch: added, multiplied, repeated as a class token is."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ..batch import Clusters
from .registry import ClusterRule, Registered, RuleContext


class PerSample(ClusterRule):
    """A parameter's copy for every row of a batch, [*shape] → [rows, *shape], without memory for it."""

    @staticmethod
    def forward(ctx: RuleContext, parameter: Tensor, rows: int) -> Tensor:
        """See `ClusterRule`."""
        return parameter.expand(rows, *parameter.shape)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        rows = grad.reshape(grad.shape[0], -1)
        sums = ops.cluster_sum(rows, clusters.offsets(grad.shape[0]))
        return sums.view(clusters.num, *grad.shape[1:]), None


PER_SAMPLE = Registered(PerSample.forward, PerSample)
