"""Cluster rules: how an operation forms the gradients of its parameters, one per cluster.

A rule is written like a `torch.autograd.Function`. Its `backward` is told the clusters and returns, for a
parameter, the gradients [K, *shape] of all clusters where an ordinary function returns their sum.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .layout import Clusters

_aten = torch.ops.aten


class NoClusterRule(RuntimeError):
    """An operation has no rule, or not for these arguments; the module that it is in runs in slices instead."""


class RuleContext:
    """What a rule's `forward` leaves for its `backward`.

    Attributes:
        needs_input_grad: for every argument of `forward`, whether a gradient is wanted.
        saved_tensors: what `save_for_backward` was given.
    """

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]

    if TYPE_CHECKING:  # whatever else a rule keeps, as on any autograd context

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self) -> None:
        self.to_save: tuple[Tensor | None, ...] = ()
        self._buffers: Callable[[int], Tensor | None] = lambda position: None

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, as `torch.autograd.Function` does."""
        self.to_save = tensors

    def buffer(self, position: int) -> Tensor | None:
        """Return memory [K, *shape] that the gradients of an argument may be written to and returned, or None."""
        return self._buffers(position)


class ClusterRule:
    """How one operation forms its gradients. Subclass it, and register it with `register_cluster_rule`.

    `forward` has the operation's own signature after `ctx`. The operation must treat the samples of a batch one
    by one: dimension 0 of its output holds a block of rows per sample.
    """

    @staticmethod
    def precision(tensor: Tensor) -> Tensor:
        """Cast an argument as autocast would for this operation; by default not at all."""
        return tensor

    @staticmethod
    def forward(ctx: RuleContext, *args: Any) -> Tensor:
        """Compute the output from arguments cast by `precision`; gradients and autocast are disabled."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """Return one gradient per argument of `forward`, those of parameters as [K, *shape]."""
        raise NotImplementedError


class Registered:
    """A rule with its operation's signature.

    Args:
        operation: the function.
        rule: its rule.

    Raises:
        TypeError: the rule is not as `ClusterRule` says.
    """

    def __init__(self, operation: Callable[..., Any], rule: type[ClusterRule]) -> None:
        if not (isinstance(rule, type) and issubclass(rule, ClusterRule)):
            raise TypeError(f"rule: expected a subclass of ClusterRule, found {rule!r}")
        for method in ("forward", "backward"):
            if getattr(rule, method) is getattr(ClusterRule, method):
                raise TypeError(f"rule: expected {rule.__name__} to define {method}, found none")
        parameters = list(inspect.signature(rule.forward).parameters.values())[1:]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise TypeError(
                f"rule: expected {rule.__name__}.forward to name every argument, found * or ** arguments"
            )
        self.operation = operation
        self.rule = rule
        self._names = [p.name for p in parameters]
        self._index = {name: i for i, name in enumerate(self._names)}
        self._defaults = [p.default for p in parameters]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the rule's arguments for a call of the operation."""
        if len(args) > len(self._defaults) or not kwargs.keys() <= self._index.keys():
            raise NoClusterRule(
                f"the rule of {self.operation.__name__} does not know arguments {args, kwargs}"
            )
        values = [*args, *self._defaults[len(args) :]]
        for name, value in kwargs.items():
            values[self._index[name]] = value
        for name, value in zip(self._names, values, strict=True):
            if value is inspect.Parameter.empty:
                raise NoClusterRule(
                    f"the rule of {self.operation.__name__} expects {name}, found no such argument"
                )
        return values

    def check_gradients(self, gradients: Any, expected: dict[int, tuple[int, ...]]) -> None:
        """Refuse what a rule's backward returned if it lacks gradients of parameters.

        Args:
            gradients: what it returned.
            expected: the shapes [K, *shape] of the parameters' gradients that were asked for, by their position.

        Raises:
            TypeError: it is not one gradient or None for every argument.
            ValueError: a parameter's gradients are missing, or have another shape.
        """
        name, count = f"rule {self.rule.__name__} of {self.operation.__name__}", len(self._names)
        if not isinstance(gradients, tuple) or len(gradients) != count:
            found = f"{len(gradients)}" if isinstance(gradients, tuple) else type(gradients).__name__
            raise TypeError(f"{name}: expected a tuple of {count} gradients, one per argument, found {found}")
        for position, shape in expected.items():
            gradient = gradients[position]
            if gradient is None or gradient.shape != shape:
                raise ValueError(
                    f"{name}: expected the gradients of {self._names[position]!r} by cluster, {list(shape)}, "
                    f"found {None if gradient is None else list(gradient.shape)}"
                )


RULES: dict[Callable[..., Any], Registered] = {}


def register_cluster_rule(
    operation: Callable[..., Any], *, replace: bool = False
) -> Callable[[type[ClusterRule]], type[ClusterRule]]:
    """Register a `ClusterRule` for an operation.

    Args:
        operation: a function that PyTorch dispatches on tensor subclasses: one of `torch`'s or
            `torch.nn.functional`'s, a Python function that begins like those of `torch.nn.functional`, with
            `torch.overrides.handle_torch_function`, or a custom operator: what `torch.library.custom_op` returned,
            or ``torch.ops.namespace.name``. The rule is for all overloads of an operator.
        replace: take the place of the rule that the operation has.

    Returns:
        A decorator for the rule class. It raises TypeError where the class is not as `ClusterRule` says.

    Raises:
        TypeError: `operation` can't be called.
        ValueError: the operation has a rule, and `replace` is not set.
    """
    if not callable(operation):
        raise TypeError(f"operation: expected a function, found {operation!r}")
    called = _called(operation)
    for function in called:
        if function in RULES and not replace:
            raise ValueError(
                f"operation: expected one without a rule, found {RULES[function].rule.__name__} for "
                f"{called[0].__name__}; pass replace=True to replace it"
            )

    def register(rule: type[ClusterRule]) -> type[ClusterRule]:
        registered = Registered(called[0], rule)
        RULES.update(dict.fromkeys(called, registered))
        return rule

    return register


def _called(operation: Any) -> list[Any]:
    """Return the functions that a call of an operation may arrive as: of a custom operator, one per overload."""
    operation = getattr(operation, "_opoverload", operation)  # of what torch.library.custom_op returns
    packet = getattr(operation, "overloadpacket", operation)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return [operation]
    return [packet, *(getattr(packet, name) for name in packet.overloads())]


def lower_precision(tensor: Tensor) -> Tensor:
    """Cast as autocast does for matrix products and convolutions."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def norm_precision(tensor: Tensor) -> Tensor:
    """Cast as autocast does for normalisation: to float32 on CUDA, not at all on the CPU."""
    device = tensor.device.type
    lower = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if lower and device != "cpu" and torch.is_autocast_enabled(device) else tensor


@register_cluster_rule(F.linear)
class Linear(ClusterRule):
    """y = x Wᵀ + b, x [..., in]."""

    precision = staticmethod(lower_precision)

    @staticmethod
    def forward(ctx: RuleContext, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `ClusterRule`."""
        if input.dim() < 2:
            raise NoClusterRule(f"linear: expected an input [B, ..., in], found {list(input.shape)}")
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
        return _aten._unsafe_view(rows @ other, [*input.shape[:-1], other.shape[1]])

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
        spatial = weight.dim() - 2
        stride, dilation = _per_dimension(stride, spatial), _per_dimension(dilation, spatial)
        if padding == "same":
            # What is left over when the total is odd goes to one side, which convolution itself can't do.
            totals = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
            if any(total % 2 for total in totals):
                raise NoClusterRule("convolution: no rule for padding='same' with an even kernel")
            padding = [total // 2 for total in totals]
        padding = _per_dimension(0 if isinstance(padding, str) else padding, spatial)
        geometry = (stride, padding, dilation, False, [0] * spatial, groups)
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
        if max_norm is not None or scale_grad_by_freq or sparse or input.dim() == 0:
            raise NoClusterRule(
                "embedding: no rule for max_norm, scale_grad_by_freq, sparse or a single index"
            )
        ctx.save_for_backward(input)
        ctx.shape = weight.shape
        ctx.padding_idx = padding_idx
        return F.embedding(input, weight)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """See `ClusterRule`."""
        (index,) = ctx.saved_tensors
        entries, width = ctx.shape
        padding_idx = ctx.padding_idx
        if padding_idx is not None:
            grad = grad.masked_fill((index == padding_idx % entries).unsqueeze(-1), 0)
        # One table per cluster, one below the other: one deterministic kernel adds up all of them.
        shifted = index.clone()
        for k, begin, end in clusters.spans(index.shape[0]):
            shifted[begin:end] += k * entries
        tables = _aten.embedding_dense_backward(grad, shifted, clusters.num * entries, -1, False)
        return None, tables.view(clusters.num, entries, width), None, None, None, None, None


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
        input = _dense(input)
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
        grad = grad.contiguous(memory_format=_memory_format(input))

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


def _per_dimension(value: int | Sequence[int], spatial: int) -> list[int]:
    values = [value] * spatial if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


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


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for order in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        fits = order is torch.contiguous_format or tensor.dim() == (4 if order is torch.channels_last else 5)
        if fits and tensor.is_contiguous(memory_format=order):
            return order
    return torch.contiguous_format


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=_memory_format(tensor))
