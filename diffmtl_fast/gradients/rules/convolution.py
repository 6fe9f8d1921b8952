"""The rule of convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.cluster_conv_wgrad import Geometry, cluster_conv_wgrad_unchecked
from ...ops.cluster_sum import cluster_sum_unchecked
from ..batch import Clusters
from .autocast import lower_precision
from .registry import ClusterRule, NoClusterRule, RuleContext, register_cluster_rule

_backward = torch.ops.aten.convolution_backward.default
_INPUT_ALONE = (True, False, False)
_SPATIAL = (2, 3, 4)


class Convolution(ClusterRule):
    """Cross-correlation over one to three dimensions, x [B, in, ...]."""

    precision = staticmethod(lower_precision)

    @staticmethod
    def forward(
        ctx: RuleContext,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """See `ClusterRule`."""
        if input.dim() != weight.dim():
            raise NoClusterRule(f"convolution: expected an input [B, in, ...], found {list(input.shape)}")
        stride, padding, dilation = per_dimension(weight, stride, padding, dilation)
        ctx.geometry = Geometry(stride, padding, dilation, groups)
        ctx.save_for_backward(input, weight)
        none = (0,) * len(stride)
        return torch.convolution(input, weight, bias, stride, padding, dilation, False, none, groups)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight = ctx.saved_tensors
        geometry, needed = ctx.geometry, ctx.needs_input_grad
        by_input, by_weight, by_bias = None, None, None
        if needed[0]:
            *options, groups = geometry
            none = (0,) * len(geometry.stride)
            by_input, _, _ = _backward(grad, input, weight, None, *options, False, none, groups, _INPUT_ALONE)
        offsets = clusters.offsets(grad.shape[0])
        if needed[1]:
            by_weight = cluster_conv_wgrad_unchecked(
                grad, input, offsets, weight.shape[2:], geometry, ctx.buffer(1)
            )
        if needed[2]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            by_sample = grad.sum(_SPATIAL[: grad.dim() - 2], dtype=wide)
            by_bias = cluster_sum_unchecked(by_sample, offsets, ctx.buffer(2))
        return by_input, by_weight, by_bias, None, None, None, None


for _operation in (F.conv1d, F.conv2d, F.conv3d):
    register_cluster_rule(_operation)(Convolution)


def per_dimension(
    weight: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Return stride, padding and dilation as sequences of one number for each spatial dimension.

    Raises:
        NoClusterRule: padding="same" would take more on one side than on the other.
    """
    spatial = weight.dim() - 2
    stride, dilation = _repeated(stride, spatial), _repeated(dilation, spatial)
    if padding == "same":
        # What is left over when the total is odd goes to one side, which convolution itself can't do.
        totals = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        if [total for total in totals if total % 2]:
            raise NoClusterRule("convolution: no rule for padding='same' with an even kernel")
        padding = [total // 2 for total in totals]
    return stride, _repeated(0 if isinstance(padding, str) else padding, spatial), dilation


def _repeated(value: int | Sequence[int], spatial: int) -> Sequence[int]:
    if isinstance(value, int):
        return [value] * spatial
    return value if len(value) > 1 else [*value] * spatial
