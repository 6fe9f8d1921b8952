"""Operations on parameters as autograd functions that the compiler can trace.

A parameter is given as three arguments: its value; a key, which is a `StandIn`'s anchor, or the rows of a
`Stacked`, or None for a constant; and the block that the gradients of all clusters are written to, or None. Where
there is a block, the gradient of the key is 1; otherwise it is the gradients [K, *shape] themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rules.normalisation import dense, memory_format

_aten = torch.ops.aten
_ours = torch.ops.diffmtl


def in_rows(offsets: Tensor, samples: int, rows: int) -> Tensor:
    """Turn offsets in samples into offsets in rows, of which every sample has equally many."""
    return offsets if rows == samples else offsets * (rows // samples)


def _one(grad: Tensor) -> Tensor:
    return grad.new_ones((), dtype=torch.float32)


def _sums(rows: Tensor, offsets: Tensor, block: Tensor | None, accumulate: bool) -> Tensor:
    """Add up the rows [N, ...] of every cluster; returns the gradient of the key."""
    flat = rows.reshape(rows.shape[0], -1)
    if block is None:
        return _ours.cluster_sum(flat, offsets).view(-1, *rows.shape[1:])
    _ours.cluster_sum_out(flat, offsets, block.view(block.shape[0], -1), accumulate)
    return _one(rows)


def _products(grad: Tensor, x: Tensor, offsets: Tensor, block: Tensor | None, accumulate: bool) -> Tensor:
    """Form every cluster's gradᵀ x; returns the gradient of the key."""
    if block is None:
        return _ours.cluster_wgrad(grad, x, offsets)
    _ours.cluster_wgrad_out(grad, x, offsets, block, accumulate)
    return _one(grad)


class Linear(torch.autograd.Function):
    """y = x Wᵀ + b, x [..., in]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_key: Tensor | None,
        weight_block: Tensor | None,
        bias: Tensor | None,
        bias_key: Tensor | None,
        bias_block: Tensor | None,
        offsets: Tensor,
        samples: int,
        accumulate: tuple[bool, bool],
    ) -> Tensor:
        """Multiply and add."""
        ctx.save_for_backward(x, weight, offsets)
        ctx.blocks = weight_block, bias_block
        ctx.samples, ctx.accumulate = samples, accumulate
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Form the gradients of all clusters."""
        x, weight, offsets = ctx.saved_tensors
        weight_block, bias_block = ctx.blocks
        by_x, by_weight, by_bias = None, None, None
        rows, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        bounds = in_rows(offsets, ctx.samples, rows.shape[0])
        if ctx.needs_input_grad[0]:
            by_x = (rows @ weight).view(x.shape)
        if ctx.needs_input_grad[2]:
            by_weight = _products(rows, flat, bounds, weight_block, ctx.accumulate[0])
        if ctx.needs_input_grad[5]:
            by_bias = _sums(rows, bounds, bias_block, ctx.accumulate[1])
        return by_x, None, by_weight, None, None, by_bias, None, None, None, None


class Matmul(torch.autograd.Function):
    """y = x W, x [..., in]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        key: Tensor | None,
        block: Tensor | None,
        offsets: Tensor,
        samples: int,
        accumulate: bool,
    ) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x, weight, offsets)
        ctx.block = block
        ctx.samples, ctx.accumulate = samples, accumulate
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Form the gradients of all clusters."""
        x, weight, offsets = ctx.saved_tensors
        block = ctx.block
        by_x, by_weight = None, None
        rows, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[0]:
            by_x = (rows @ weight.t()).view(x.shape)
        if ctx.needs_input_grad[2]:
            bounds = in_rows(offsets, ctx.samples, rows.shape[0])
            by_weight = _products(flat, rows, bounds, block, ctx.accumulate)
        return by_x, None, by_weight, None, None, None, None


class Convolution(torch.autograd.Function):
    """Cross-correlation over one to three dimensions, x [B, in, ...], or, transposed, the backward of one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        weight_key: Tensor | None,
        weight_block: Tensor | None,
        bias: Tensor | None,
        bias_key: Tensor | None,
        bias_block: Tensor | None,
        offsets: Tensor,
        host_offsets: Tensor,
        samples: int,
        accumulate: tuple[bool, bool],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        transposed: bool,
        output_padding: Sequence[int],
    ) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(x, weight, offsets, host_offsets)
        ctx.blocks = weight_block, bias_block
        ctx.samples, ctx.accumulate = samples, accumulate
        ctx.stride, ctx.padding, ctx.dilation, ctx.groups = stride, padding, dilation, groups
        ctx.transposed, ctx.output_padding = transposed, output_padding
        geometry = stride, padding, dilation, transposed, output_padding
        return _aten.convolution(x, weight, bias, *geometry, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Form the gradients of all clusters."""
        x, weight, offsets, host_offsets = ctx.saved_tensors
        block, bias_block = ctx.blocks
        by_x, by_weight, by_bias = None, None, None
        geometry = (ctx.stride, ctx.padding, ctx.dilation)
        if ctx.needs_input_grad[0]:
            rest = (ctx.transposed, ctx.output_padding, ctx.groups, [True, False, False])
            by_x = _aten.convolution_backward(grad, x, weight, None, *geometry, *rest)[0]
        if ctx.needs_input_grad[2]:
            bounds = in_rows(host_offsets, ctx.samples, x.shape[0])
            ends = (x, grad) if ctx.transposed else (grad, x)
            arguments = (*ends, bounds, list(weight.shape[2:]), *geometry, ctx.groups)
            if block is None:
                by_weight = _ours.cluster_conv_wgrad(*arguments)
            else:
                _ours.cluster_conv_wgrad_out(*arguments, block, ctx.accumulate[0])
                by_weight = _one(grad)
        if ctx.needs_input_grad[5]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            by_sample = grad.sum(list(range(2, grad.dim())), dtype=wide)
            by_bias = _sums(
                by_sample, in_rows(offsets, ctx.samples, x.shape[0]), bias_block, ctx.accumulate[1]
            )
        return by_x, None, by_weight, None, None, by_bias, *[None] * 11


class GroupNorm(torch.autograd.Function):
    """Normalisation over groups of channels, x [B, C, ...]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        weight_key: Tensor | None,
        weight_block: Tensor | None,
        bias: Tensor | None,
        bias_key: Tensor | None,
        bias_block: Tensor | None,
        offsets: Tensor,
        samples: int,
        accumulate: tuple[bool, bool],
        groups: int,
        eps: float,
    ) -> Tensor:
        """Normalise."""
        x = dense(x)
        batch, channels = x.shape[:2]
        size = x[0, 0].numel()
        out, mean, rstd = _aten.native_group_norm(x, weight, bias, batch, channels, size, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd, offsets)
        ctx.blocks = weight_block, bias_block
        ctx.samples, ctx.accumulate, ctx.shape = samples, accumulate, (batch, channels, size, groups)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Form all gradients from Σ g z and Σ g over the positions of each channel; see `ops.group_norm_backward`.

        Not by PyTorch's own operation: compiled by PyTorch 2.9, it refuses a number of channels that may vary.
        """
        x, weight, mean, rstd, offsets = ctx.saved_tensors
        grad = grad.contiguous(memory_format=memory_format(x))
        batch, channels, size, groups = ctx.shape
        bounds = in_rows(offsets, ctx.samples, batch)
        by_x, by_weight, by_bias = None, None, None
        grouped = batch, groups, channels // groups
        mean, rstd = mean.view(batch, groups, 1), rstd.view(batch, groups, 1)
        slope, along = (t.reshape(batch, channels, size).sum(2).view(grouped) for t in (grad, grad * x))
        by_normal = (along - slope * mean) * rstd
        if ctx.needs_input_grad[0]:
            scale = 1 if weight is None else weight.view(grouped[1:])
            along, level = (
                (sums * scale).sum(2, keepdim=True) / (grouped[2] * size) for sums in (by_normal, slope)
            )
            bend = along * rstd * rstd
            steep, bend, shift = (
                t.expand(grouped).reshape(batch, channels, *[1] * (x.dim() - 2))
                for t in (rstd * scale, bend, bend * mean - level * rstd)
            )
            by_x = grad * steep - x * bend + shift
        if ctx.needs_input_grad[2]:
            by_weight = _sums(by_normal.view(batch, channels), bounds, ctx.blocks[0], ctx.accumulate[0])
        if ctx.needs_input_grad[5]:
            by_bias = _sums(slope.view(batch, channels), bounds, ctx.blocks[1], ctx.accumulate[1])
        return by_x, None, by_weight, None, None, by_bias, *[None] * 6


class Embedding(torch.autograd.Function):
    """Rows of a table, looked up by indices [B, ...]."""

    @staticmethod
    def forward(
        ctx: Any,
        index: Tensor,
        table: Tensor,
        key: Tensor | None,
        block: Tensor | None,
        cluster: Tensor,
        num_clusters: int,
        padding_idx: int | None,
        accumulate: bool,
    ) -> Tensor:
        """Look up."""
        ctx.save_for_backward(index, cluster)
        ctx.block = block
        ctx.num_clusters, ctx.padding_idx, ctx.accumulate = num_clusters, padding_idx, accumulate
        ctx.entries = table.shape[0]
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Form the gradients of all clusters: their tables one below the other, by one deterministic kernel."""
        index, cluster = ctx.saved_tensors
        block = ctx.block
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((index == ctx.padding_idx % ctx.entries).unsqueeze(-1), 0)
        per_sample = index.shape[0] // cluster.shape[0]
        by_row = cluster.unsqueeze(1).expand(-1, per_sample).reshape(-1, *[1] * (index.dim() - 1))
        total = ctx.num_clusters * ctx.entries
        tables = _aten.embedding_dense_backward(grad, index + by_row * ctx.entries, total, -1, False)
        by_table = tables.view(ctx.num_clusters, ctx.entries, -1)
        if block is not None:
            block.copy_(block + by_table if ctx.accumulate else by_table)
            by_table = _one(grad)
        return None, None, by_table, *[None] * 5


class Stack(torch.autograd.Function):
    """A parameter once per cluster, [*shape] → [K, *shape], without memory for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, block: Tensor, accumulate: bool) -> Tensor:
        """Repeat."""
        ctx.block, ctx.accumulate = block, accumulate
        return value.expand(block.shape[0], *value.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Write the gradients of all clusters."""
        block = ctx.block
        block.copy_(block + grad if ctx.accumulate else grad)
        return None, _one(grad), None, None


class PerRow(torch.autograd.Function):
    """Equal rows [K, *shape], given once for every row of a batch: [rows, *shape], without memory for it."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, rows: int, offsets: Tensor, samples: int) -> Tensor:
        """Repeat."""
        ctx.save_for_backward(offsets)
        ctx.samples = samples
        return stacked[0].expand(rows, *stacked.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Add up every cluster's rows."""
        (offsets,) = ctx.saved_tensors
        return _sums(grad, in_rows(offsets, ctx.samples, grad.shape[0]), None, False), None, None, None
