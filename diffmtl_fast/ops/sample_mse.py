"""`sample_mse`: the mean squared error of every sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_pair
from ._library import define_op, refuse_autograd, register_autograd


def sample_mse_plain(pred: Tensor, target: Tensor) -> Tensor:
    """Compute `sample_mse` by its definition."""
    dtype = accumulation_dtype(pred, target)
    # The trailing axis lets one line serve [B] as well as [B, ...].
    return (pred.to(dtype) - target.to(dtype)).square().unsqueeze(-1).flatten(1).mean(1)


def sample_mse_backward_plain(grad: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    """Compute the gradient by `pred`, 2 (pred − target) grad / numel per sample, in the dtype of `pred`."""
    dtype = accumulation_dtype(pred, target)
    scale = grad.to(dtype) * (2.0 / math.prod(pred.shape[1:]))
    error = pred.to(dtype) - target.to(dtype)
    return (error * scale.view(-1, *[1] * (pred.dim() - 1))).to(pred.dtype)


def _fake(pred: Tensor, target: Tensor) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=accumulation_dtype(pred, target))


def _backward_fake(grad: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    return torch.empty_like(pred)


_sample_mse = define_op(
    "sample_mse(Tensor pred, Tensor target) -> Tensor", plain=sample_mse_plain, fake=_fake
)
_sample_mse_backward = define_op(
    "sample_mse_backward(Tensor grad, Tensor pred, Tensor target) -> Tensor",
    plain=sample_mse_backward_plain,
    fake=_backward_fake,
)
refuse_autograd("sample_mse_backward", "the second derivative of sample_mse is not implemented")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    pred, target = ctx.saved_tensors
    return pair_gradients(grad, pred, target, ctx.needs_input_grad)


def pair_gradients(
    grad: Tensor, pred: Tensor, target: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by `pred` and by `target`, given the one by each sample's error [B].

    The error is symmetric, so the target's gradient is the same formula with the roles exchanged.
    """
    grad_pred = _sample_mse_backward(grad, pred, target) if needed[0] else None
    grad_target = _sample_mse_backward(grad, target, pred) if needed[1] else None
    return grad_pred, grad_target


register_autograd("sample_mse", _backward, _setup_context)


def sample_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample, L_b = mean over elements of (pred_b − target_b)².

    Args:
        pred: [B, ...], floating point.
        target: of the same shape and device; the dtype may differ (bfloat16 against float32 under autocast).

    Returns:
        [B], in the promoted dtype of both and float32 at least. Autocast does not change it.

    Raises:
        TypeError: an input is not floating point.
        ValueError: shapes or devices differ, or a sample has no elements.
    """
    check_pair(pred, target)
    return _sample_mse(pred, target)
