"""Parameters that are broadcast over the batch: added, multiplied, repeated as a class token is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...ops.cluster_sum import cluster_sum_unchecked
from ..batch import Clusters
from .registry import ClusterRule, Registered, RuleContext

# Operations that broadcast: a parameter among their arguments may be given once per row of the batch instead.
BROADCASTING = frozenset(
    [
        *("add", "add_", "sub", "sub_", "subtract", "rsub", "__rsub__", "mul", "mul_", "multiply"),
        *("div", "div_", "divide", "true_divide", "__rdiv__", "pow", "__rpow__", "addcmul", "lerp"),
        *("where", "maximum", "minimum", "clamp", "clip"),
    ]
)
# So do these along any dimension but the samples'.
JOINING = frozenset(["cat", "concat", "concatenate", "stack"])
# With these a parameter is given to every sample, as a class token is.
REPEATING = frozenset(["expand", "broadcast_to", "repeat", "tile"])
# Operations that ask another tensor only for its shape or type: what they do, and what to ask for.
LIKE: dict[Any, tuple[Any, Callable[[Tensor], tuple[Any, ...]]]] = {
    Tensor.expand_as: (Tensor.expand, lambda other: (other.shape,)),
    Tensor.view_as: (Tensor.view, lambda other: (other.shape,)),
    Tensor.reshape_as: (Tensor.reshape, lambda other: (other.shape,)),
    Tensor.type_as: (Tensor.to, lambda other: (other.device, other.dtype)),
    Tensor.to: (Tensor.to, lambda other: (other.device, other.dtype)),
}


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
        offsets = clusters.offsets(grad.shape[0])
        buffer = ctx.buffer(0)
        out = None if buffer is None else buffer.view(clusters.num, -1)
        return cluster_sum_unchecked(rows, offsets, out).view(clusters.num, *grad.shape[1:]), None


PER_SAMPLE = Registered(PerSample.forward, PerSample)
