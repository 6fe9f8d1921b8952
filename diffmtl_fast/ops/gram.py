"""`gram`: the Gramian of the cluster gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_floating
from ._library import define_op, register_autograd


def gram_plain(jacobian: Tensor) -> Tensor:
    """Compute `gram` by its definition."""
    rows = jacobian.to(accumulation_dtype(jacobian))
    with torch.autocast(rows.device.type, enabled=False):  # a Gramian in bfloat16 would be noise
        gramian = rows @ rows.T
    # A library's product is symmetric only up to rounding; the Gramian is symmetric by definition.
    return (gramian + gramian.T) / 2


_gram = define_op(
    "gram(Tensor jacobian) -> Tensor",
    plain=gram_plain,
    fake=lambda jacobian: jacobian.new_empty([jacobian.shape[0]] * 2, dtype=accumulation_dtype(jacobian)),
)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (jacobian,) = ctx.saved_tensors
    with torch.autocast(grad.device.type, enabled=False):
        return ((grad + grad.T) @ jacobian.to(grad.dtype)).to(jacobian.dtype)


register_autograd("gram", _backward, _setup_context)


def gram(jacobian: Tensor) -> Tensor:
    """Gramian of the rows of J, G = J Jᵀ.

    Args:
        jacobian: J, [K, P], floating point; row k is the gradient of cluster k.

    Returns:
        G, [K, K], exactly symmetric; accumulated and returned in float32, or in float64 for a float64 J.

    Raises:
        TypeError: J is not floating point.
        ValueError: J is not two-dimensional.
    """
    check_floating(jacobian=jacobian)
    if jacobian.dim() != 2:
        raise ValueError(f"jacobian: expected shape [K, P], found {list(jacobian.shape)}")
    return _gram(jacobian)
