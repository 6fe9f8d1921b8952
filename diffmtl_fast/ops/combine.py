"""`combine`, `combine_`: one update direction from weighted cluster gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_each_floating, check_jacobian, check_parts, check_weights
from ._layout import as_matrix, empty_row
from ._library import define_op, refuse_autograd_in_place, register_autograd


def combine_plain(jacobian: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Compute `combine` by its definition."""
    out = _fake(jacobian, weights)
    combine_in_place_plain(out, jacobian, weights, [False] * len(out))
    return out


def combine_in_place_plain(
    out: Sequence[Tensor], jacobian: Sequence[Tensor], weights: Tensor, accumulate: Sequence[bool]
) -> Tensor:
    """Compute `combine_` by its definition."""
    square = _fake_in_place(out, jacobian, weights, accumulate).zero_()
    for written, member, add in zip(out, jacobian, accumulate, strict=True):
        dtype = accumulation_dtype(written, member)
        direction = (weights.to(dtype) @ as_matrix(member).to(dtype)).view(written.shape)
        written.copy_(written + direction if add else direction)
        square += written.to(square.dtype).square().sum()
    return square


def _fake(jacobian: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [empty_row(member) for member in jacobian]


def _fake_in_place(
    out: Sequence[Tensor], jacobian: Sequence[Tensor], weights: Tensor, accumulate: Sequence[bool]
) -> Tensor:
    return weights.new_empty([], dtype=torch.float64)


_combine = define_op(
    "combine(Tensor[] jacobian, Tensor weights) -> Tensor[]", plain=combine_plain, fake=_fake
)
_combine_in_place = define_op(
    "combine_(Tensor(a!)[] out, Tensor[] jacobian, Tensor weights, bool[] accumulate) -> Tensor",
    plain=combine_in_place_plain,
    fake=_fake_in_place,
)
refuse_autograd_in_place("combine_", "differentiate through combine, or detach its inputs")


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[0], inputs[1])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    *jacobian, weights = ctx.saved_tensors
    grad_jacobian, grad_weights = [], torch.zeros_like(weights, dtype=accumulation_dtype(*jacobian, weights))
    for member, grad in zip(jacobian, grads, strict=True):
        dtype = accumulation_dtype(member)
        flat = grad.reshape(-1).to(dtype)
        grad_jacobian.append(torch.outer(weights.to(dtype), flat).to(member.dtype).view(member.shape))
        grad_weights = grad_weights + as_matrix(member).to(dtype) @ flat
    return grad_jacobian, grad_weights.to(weights.dtype)


register_autograd("combine", _backward, _setup_context)


@overload
def combine(jacobian: Tensor, weights: Tensor) -> Tensor: ...


@overload
def combine(jacobian: Sequence[Tensor], weights: Tensor) -> list[Tensor]: ...


def combine(jacobian: Tensor | Sequence[Tensor], weights: Tensor) -> Tensor | list[Tensor]:
    """Weighted sum of the rows of J, d = Σ_k w_k g_k.

    Args:
        jacobian: J, [K, P], floating point; row k is the gradient g_k of cluster k. Or J in parts, one tensor
            [K, ...] for every parameter, of any sizes and dtypes: one pass covers all of them.
        weights: w, [K], floating point, on the same device.

    Returns:
        d, [P], in the dtype of J; accumulated in float32 at least. For a J in parts one tensor [...] per part, in
        its dtype and its order in memory.

    Raises:
        TypeError: an input is not floating point.
        ValueError: shapes or devices do not fit.
    """
    parts = check_jacobian(jacobian)
    check_weights(weights, parts)
    directions = _combine(parts, weights)
    return directions[0] if isinstance(jacobian, Tensor) else directions


def combine_(
    out: Sequence[Tensor],
    jacobian: Sequence[Tensor],
    weights: Tensor,
    *,
    accumulate: bool | Sequence[bool] = False,
) -> Tensor:
    """Write Σ_k w_k g_k into given tensors, such as the parameters' ``.grad``, and return its squared norm.

    Nothing is copied where ``out[l]`` is dense and the rows of ``jacobian[l]`` lie in memory as it does; gradients
    cannot flow through.

    Args:
        out: one tensor for every parameter, floating point, of any dtypes; overlapping neither each other nor J.
        jacobian: J in parts, one tensor [K, \\*out[l].shape] for every parameter, of any dtypes, on the device of
            `out`.
        weights: w, [K], floating point, on the same device.
        accumulate: add to what `out` holds instead of replacing it; one answer, or one for every parameter.

    Returns:
        Σ_l ‖out[l]‖² of what `out` now holds, float64, 0-dim, right at any scale that the dtypes of `out`
        hold. Its root is the norm to clip by.

    Raises:
        TypeError: an input is not floating point.
        ValueError: numbers of tensors, shapes or devices do not fit.
    """
    out, parts = check_each_floating("out", out), check_parts(jacobian)
    check_weights(weights, parts)
    flags = [accumulate] * len(out) if isinstance(accumulate, bool) else list(accumulate)
    if not len(out) == len(parts) == len(flags):
        raise ValueError(
            "expected as many tensors in out as in jacobian and as flags in accumulate, found "
            f"{len(out)}, {len(parts)} and {len(flags)}"
        )
    device = weights.device
    for i, (written, member) in enumerate(zip(out, parts, strict=True)):
        expected = member.shape[1:]
        if written.shape != expected:
            raise ValueError(f"out[{i}]: expected shape {list(expected)}, found {list(written.shape)}")
        if written.device != device:
            raise ValueError(f"out[{i}]: expected a tensor on {device}, found one on {written.device}")
    return _combine_in_place(out, parts, weights, flags)
