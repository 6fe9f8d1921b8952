"""Decides how an operation on a stand-in is run. The compiler traces this, so it is plain Python over tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_state import writes_in_place
from ..rules import NoClusterRule
from ..rules.autocast import lower_precision, norm_precision
from ..rules.broadcast import BROADCASTING, JOINING, LIKE, REPEATING
from ..rules.convolution import per_dimension
from . import operations
from .stand_in import Stacked, StandIn, batch, first_of, rows_of, run_by

# Attributes that are tensors with a gradient; others say something about the parameter, or have none.
_VIEWS = tuple([getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")])


def _functions(names: Iterable[str]) -> dict[Any, str]:
    """Return the functions of these names: the compiler can look functions up, but not their names."""
    holders = (Tensor, torch)
    return {getattr(holder, name): name for name in names for holder in holders if hasattr(holder, name)}


_BROADCASTING, _JOINING, _REPEATING = _functions(BROADCASTING), _functions(JOINING), _functions(REPEATING)
_DETACHING = _functions(["detach"])
_WRITING = _functions(name for name in dir(Tensor) if writes_in_place(getattr(Tensor, name)))


@run_by
def operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation with stand-ins among its arguments.

    Raises:
        NoClusterRule: it can't be run so that the gradients of the clusters can be told apart.
    """
    about = _name(func) == "__get__" and func not in _VIEWS
    if about or not torch.is_grad_enabled() or func in _DETACHING:
        return func(*_swap(args, _value), **_swap(kwargs, _value))
    if func is F.multi_head_attention_forward:
        return _attention(*args, **kwargs)
    rule = _RULES.get(func)
    if rule is not None and _is_batch(args[0] if args else kwargs.get("input")):
        return rule(*args, **kwargs)
    if func in _WRITING and _is_stand_in(args[0]):
        raise NoClusterRule(f"{_name(func)} writes to a parameter")
    if func in LIKE and len(args) > 1 and isinstance(args[1], Tensor):
        return _like(func, args, kwargs)
    widest = _widest(args, kwargs)
    if widest is not None:
        return _broadcast(func, args, kwargs, widest)
    return _derive(func, args, kwargs)


# ----- Parameters as arguments


def _is_stand_in(value: Any) -> bool:
    return isinstance(value, (StandIn, Stacked))  # PyTorch 2.9 compiles no union of types


def _is_batch(value: Any) -> bool:
    """Tell whether a tensor has equally many rows for every sample, as far as its shape tells."""
    if not isinstance(value, Tensor) or _is_stand_in(value) or value.dim() == 0:
        return False
    return value.shape[0] > 0 and value.shape[0] % batch.cluster.shape[0] == 0


def _value(stand_in: Any) -> Tensor:
    return stand_in.value if isinstance(stand_in, StandIn) else first_of(stand_in)


def _count(stand_in: StandIn) -> None:
    if not torch.compiler.is_compiling():
        stand_in.uses += 1


def _stacked(stand_in: Any) -> Tensor:
    """Return a stand-in's value once per cluster, [K, *shape], differentiably."""
    if isinstance(stand_in, Stacked):
        return rows_of(stand_in)
    _count(stand_in)
    return operations.Stack.apply(stand_in.value, stand_in.anchor, stand_in.block, stand_in.accumulate)


def _given(parameter: Any, precision: Callable[[Tensor], Tensor]) -> tuple[Any, Any, Any, bool]:
    """Return a parameter as `operations` take it, and whether its gradients are added to what is there."""
    if isinstance(parameter, StandIn):
        _count(parameter)
        return precision(parameter.value), parameter.anchor, parameter.block, parameter.accumulate
    if isinstance(parameter, Stacked):
        rows = precision(rows_of(parameter))
        return rows[0].detach(), rows, None, False
    if parameter is not None and parameter.requires_grad:
        raise NoClusterRule(
            "expected a parameter or a constant beside another one, found a tensor of the batch"
        )
    return None if parameter is None else precision(parameter), None, None, False


def _swap(tree: Any, replace: Callable[[Any], Any]) -> Any:
    """Replace the stand-ins in a call's arguments."""
    if _is_stand_in(tree):
        return replace(tree)
    if isinstance(tree, list):
        return [_swap(item, replace) for item in tree]
    if type(tree) is tuple:
        return tuple([_swap(item, replace) for item in tree])
    if isinstance(tree, dict):
        return {name: _swap(item, replace) for name, item in tree.items()}
    return tree


def _tensors(tree: Any) -> list[Any]:
    """Return the tensors in a call's arguments, stand-ins included."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in _tensors(item)]
    if isinstance(tree, dict):
        return [tensor for item in tree.values() for tensor in _tensors(item)]
    return []


def _widest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the argument with the most dimensions that is a batch, as far as can be seen."""
    tensors = _tensors((args, kwargs))
    least = max([_value(tensor).dim() for tensor in tensors if _is_stand_in(tensor)])
    found = None
    for tensor in tensors:
        if _is_stand_in(tensor) or not (tensor.requires_grad or _is_batch(tensor)):
            continue
        wider = found is None or tensor.dim() > found.dim()
        if wider and (tensor.requires_grad or tensor.dim() >= least):
            found = tensor
    return found


# ----- Operations that combine a parameter with a batch element by element


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _lacks_rows(value: Tensor, dims: int) -> bool:
    """Tell whether a value broadcasts over dimension 0 of a batch with so many dimensions."""
    return value.dim() < dims or (value.dim() == dims and dims > 0 and value.shape[0] == 1)


def _broadcast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], widest: Tensor) -> Any:
    """Run an operation with every parameter given once per row of the batch."""
    dims, rows = widest.dim(), widest.shape[0]
    stand_ins = [tensor for tensor in _tensors((args, kwargs)) if _is_stand_in(tensor)]
    lacking = not [stand_in for stand_in in stand_ins if not _lacks_rows(_value(stand_in), dims)]
    if not widest.requires_grad and not lacking:
        return _derive(func, args, kwargs)  # a constant that has as many rows as samples by chance
    if func in _JOINING:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        allowed = isinstance(dim, int) and dim % (dims + (_JOINING[func] == "stack")) != 0
    else:
        allowed = func in _BROADCASTING
    if not allowed or not lacking:
        raise NoClusterRule(f"no rule for {_name(func)}")

    def per_row(stand_in: Any) -> Tensor:
        return _rows(stand_in, dims, rows)

    return func(*_swap(args, per_row), **_swap(kwargs, per_row))


def _rows(stand_in: Any, dims: int, rows: int) -> Tensor:
    """Return a parameter once per row, with so many dimensions in all."""
    stacked = _stacked(stand_in)
    copies = operations.PerRow.apply(stacked, rows, batch.offsets, batch.cluster.shape[0])
    extra = dims - (stacked.dim() - 1)  # dimensions of the batch that the parameter does not have
    if extra == 0:
        return copies.squeeze(1)
    return copies.reshape(rows, *[1] * (extra - 1), *stacked.shape[1:])


# ----- Operations on parameters and constants alone


def _derive(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a tensor from parameters and constants: a `Stacked`, or a batch of copies."""
    plain = func(*_swap(args, _value), **_swap(kwargs, _value))
    found = [plain] if isinstance(plain, Tensor) else list(plain) if isinstance(plain, (tuple, list)) else []
    if not [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]:
        return plain
    if func in _REPEATING and _is_stand_in(args[0]):
        value = _value(args[0])
        if _is_batch(plain) and _lacks_rows(value, plain.dim()):
            copies = _rows(args[0], plain.dim(), plain.shape[0])
            return copies.repeat(1, *[n // m for n, m in zip(plain.shape[1:], copies.shape[1:], strict=True)])
    stacked = [_stacked(t) for t in _tensors((args, kwargs)) if _is_stand_in(t)]

    def compute(*values: Tensor) -> Any:
        rest = iter(values)
        return func(*_swap(args, lambda _: next(rest)), **_swap(kwargs, lambda _: next(rest)))

    result = torch.vmap(compute)(*stacked)
    if isinstance(result, Tensor):
        return result.as_subclass(Stacked)
    return tuple([item.as_subclass(Stacked) for item in result])


def _like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that asks its second argument only for its shape or type."""
    first, other, *rest = args
    if not _is_stand_in(first):
        return func(first, _value(other), *rest, **kwargs)
    plain = _value(other) if _is_stand_in(other) else other
    run, ask = LIKE[func]
    return _derive(run, (first, *ask(plain), *rest), kwargs)


# ----- Operations with a rule


def _linear(input: Tensor, weight: Any, bias: Any = None) -> Tensor:
    if input.dim() < 2 or _value_dims(weight) != 2:
        raise NoClusterRule("linear: expected an input [B, ..., in] and a weight [out, in]")
    w, w_key, w_block, w_add = _given(weight, lower_precision)
    b, b_key, b_block, b_add = _given(bias, lower_precision)
    x, offsets, samples = lower_precision(input), batch.offsets, batch.cluster.shape[0]
    return operations.Linear.apply(x, w, w_key, w_block, b, b_key, b_block, offsets, samples, (w_add, b_add))


def _value_dims(weight: Any) -> int:
    return (_value(weight) if _is_stand_in(weight) else weight).dim()


def _matmul(input: Tensor, other: Any) -> Tensor:
    if input.dim() < 2 or _value_dims(other) != 2:
        raise NoClusterRule("matmul: expected [B, ..., in] times [in, out]")
    w, key, block, add = _given(other, lower_precision)
    return operations.Matmul.apply(
        lower_precision(input), w, key, block, batch.offsets, batch.cluster.shape[0], add
    )


def _convolution(
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    output_padding: Any = None,  # of a transposed one
) -> Tensor:
    w, w_key, w_block, w_add = _given(weight, lower_precision)
    b, b_key, b_block, b_add = _given(bias, lower_precision)
    if input.dim() != w.dim():
        raise NoClusterRule("convolution: expected an input [B, in, ...]")
    stride, padding, dilation = per_dimension(w, stride, padding, dilation)
    extra, *_ = per_dimension(w, output_padding or 0, 0, 1)
    return operations.Convolution.apply(
        lower_precision(input), w, w_key, w_block, b, b_key, b_block,
        batch.offsets, batch.host_offsets, batch.cluster.shape[0], (w_add, b_add),
        stride, padding, dilation, groups, output_padding is not None, extra,
    )  # fmt: skip


def _transposed_convolution(
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    return _convolution(input, weight, bias, stride, padding, dilation, groups, output_padding)


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    if input.dim() == len(normalized_shape):
        raise NoClusterRule("layer_norm: expected an input [B, ...]")
    x = norm_precision(input)
    return _affine(F.layer_norm(_wide(x), normalized_shape, None, None, eps), x.dtype, weight, bias)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    if input.dim() == len(normalized_shape):
        raise NoClusterRule("rms_norm: expected an input [B, ...]")
    x = norm_precision(input)
    return _affine(F.rms_norm(_wide(x), normalized_shape, None, eps), x.dtype, weight, None)


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    x = norm_precision(input)
    wide = _wide(x)
    w, w_key, w_block, w_add = _given(weight, lambda t: t.to(wide.dtype))
    b, b_key, b_block, b_add = _given(bias, lambda t: t.to(wide.dtype))
    return operations.GroupNorm.apply(
        wide, w, w_key, w_block, b, b_key, b_block,
        batch.offsets, batch.cluster.shape[0], (w_add, b_add), num_groups, eps,
    ).to(x.dtype)  # fmt: skip


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(normal: Tensor, dtype: torch.dtype, weight: Any, bias: Any) -> Tensor:
    """Scale and shift what is normalised."""
    if weight is not None:
        normal = normal * _aligned(weight, normal)
    if bias is not None:
        normal = normal + _aligned(bias, normal)
    return normal.to(dtype)


def _aligned(parameter: Any, normal: Tensor) -> Tensor:
    return _rows(parameter, normal.dim(), normal.shape[0]) if _is_stand_in(parameter) else parameter


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if sparse or max_norm is not None or scale_grad_by_freq:
        raise NoClusterRule(
            "embedding: no rule for sparse, max_norm or scale_grad_by_freq in compiled models"
        )
    table, key, block, add = _given(weight, lambda t: t)
    num = batch.offsets.shape[0] - 1
    return operations.Embedding.apply(input, table, key, block, batch.cluster, num, padding_idx, add)


# ----- Attention, of which the projections alone have parameters


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # tells what attn_mask is
) -> tuple[Tensor, Tensor | None]:
    """See `torch.nn.functional.multi_head_attention_forward`; samples lie along dimension 1."""
    unknown = [each for each in (bias_k, bias_v, static_k, static_v) if each is not None]
    if unknown or add_zero_attn or _is_stand_in(attn_mask):
        raise NoClusterRule(
            "multi_head_attention_forward: no rule for bias_k, add_zero_attn, static_k or a learned mask"
        )
    inputs = [each.transpose(0, 1) for each in (query, key, value)]
    if query.dim() != 3 or [each for each in inputs if not _is_batch(each)]:
        raise NoClusterRule("multi_head_attention_forward: expected inputs [L, B, E]")
    if query is key and key is value and not use_separate_proj_weight:
        projected = _linear(inputs[0], in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if use_separate_proj_weight else _thirds(in_proj_weight)
        given = zip(inputs, weights, _thirds(in_proj_bias), strict=True)
        projected = tuple([_linear(x, weight, bias) for x, weight, bias in given])
    q, k, v = [each.unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in projected]
    mask, dropout = _attention_mask(attn_mask, key_padding_mask, q), dropout_p if training else 0.0
    if need_weights:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        out, shares = weights @ v, weights.mean(1) if average_attn_weights else weights
    else:
        out, shares = F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    return _linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1), shares


def _thirds(parameter: Any) -> Any:
    """Cut a parameter of three projections into theirs."""
    if parameter is None:
        return None, None, None
    return operate(torch.chunk, (parameter, 3), {}) if _is_stand_in(parameter) else parameter.chunk(3)


def _attention_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return what is added to scores [B, heads, L, S]; None for nothing."""
    batch_size, heads = q.shape[:2]
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(batch_size, heads, *attn_mask.shape[1:])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(batch_size, 1, 1, -1)
    total = None
    for mask in (attn_mask, key_padding_mask):
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = q.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
            total = mask if total is None else total + mask
    return None if total is None else total.to(q.dtype)


_RULES: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution,
    F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.embedding: _embedding,
}
