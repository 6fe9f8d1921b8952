"""The rule of convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ..batch import Clusters
from .autocast import lower_precision
from .registry import ClusterRule, NoClusterRule, RuleContext, register_cluster_rule

_aten = torch.ops.aten


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
        sizes = per_dimension(weight, stride, padding, dilation)
        geometry = (*sizes, False, [0] * (weight.dim() - 2), groups)
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        return _aten.convolution(input, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        input, weight = ctx.saved_tensors
        geometry = ctx.geometry
        by_input, by_weight, by_bias = None, None, None
        if ctx.needs_input_grad[0]:
            by_input = _aten.convolution_backward(grad, input, weight, None, *geometry, [True, False, False])[
                0
            ]
        offsets = clusters.offsets(grad.shape[0])
        if ctx.needs_input_grad[1]:
            stride, padding, dilation, _, _, groups = geometry
            by_weight = ops.cluster_conv_wgrad(
                grad,
                input,
                offsets,
                weight.shape[2:],
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                out=ctx.buffer(1),
            )
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            by_sample = grad.sum(list(range(2, grad.dim())), dtype=wide)
            by_bias = ops.cluster_sum(by_sample, offsets, out=ctx.buffer(2))
        return by_input, by_weight, by_bias, None, None, None, None


for _operation in (F.conv1d, F.conv2d, F.conv3d):
    register_cluster_rule(_operation)(Convolution)


def per_dimension(
    weight: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[list[int], list[int], list[int]]:
    """Return stride, padding and dilation as lists of one number for each spatial dimension.

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


def _repeated(value: int | Sequence[int], spatial: int) -> list[int]:
    values = [value] * spatial if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values
