"""`combine`: one update direction from weighted cluster gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_floating, check_same_device
from ._library import define_op, register_autograd


def combine_plain(jacobian: Tensor, weights: Tensor) -> Tensor:
    """Compute `combine` by its definition."""
    dtype = accumulation_dtype(jacobian)
    with torch.autocast(jacobian.device.type, enabled=False):
        return (weights.to(dtype) @ jacobian.to(dtype)).to(jacobian.dtype)


_combine = define_op(
    "combine(Tensor jacobian, Tensor weights) -> Tensor",
    plain=combine_plain,
    fake=lambda jacobian, weights: jacobian.new_empty(jacobian.shape[1:]),
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    jacobian, weights = ctx.saved_tensors
    dtype = accumulation_dtype(jacobian)
    with torch.autocast(grad.device.type, enabled=False):
        grad_jacobian = torch.outer(weights.to(dtype), grad.to(dtype)).to(jacobian.dtype)
        grad_weights = (jacobian.to(dtype) @ grad.to(dtype)).to(weights.dtype)
    return grad_jacobian, grad_weights


register_autograd("combine", _backward, _setup_context)


def combine(jacobian: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rows of J, d = Σ_k w_k g_k.

    Args:
        jacobian: J, [K, P], floating point; row k is the gradient g_k of cluster k.
        weights: w, [K], floating point, on the same device.

    Returns:
        d, [P], in the dtype of J; accumulated in float32 at least.

    Raises:
        TypeError: an input is not floating point.
        ValueError: shapes or devices do not fit.
    """
    check_floating(jacobian=jacobian, weights=weights)
    check_same_device(jacobian=jacobian, weights=weights)
    if jacobian.dim() != 2 or weights.shape != jacobian.shape[:1]:
        raise ValueError(
            f"expected jacobian [K, P] and weights [K], found {list(jacobian.shape)} and {list(weights.shape)}"
        )
    return _combine(jacobian, weights)
