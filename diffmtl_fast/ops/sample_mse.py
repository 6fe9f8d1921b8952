"""`sample_mse`: the mean squared error of every sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_pair, check_weight
from ._library import define_op, refuse_autograd, register_autograd


def sample_mse_plain(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute `sample_mse` by its definition."""
    dtype = accumulation_dtype(pred, target)
    # The trailing axis lets one line serve [B] as well as [B, ...].
    losses = (pred.to(dtype) - target.to(dtype)).square().unsqueeze(-1).flatten(1).mean(1)
    return losses if weight is None else losses * weight.to(dtype)


def sample_mse_backward_plain(scale: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    """Compute 2 (pred − target) scale / numel per sample, [B, ...], in the dtype of `pred`."""
    dtype = accumulation_dtype(pred, target)
    factor = scale.to(dtype) * (2.0 / math.prod(pred.shape[1:]))
    return ((pred.to(dtype) - target.to(dtype)) * factor.view(-1, *[1] * (pred.dim() - 1))).to(pred.dtype)


def _fake(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=accumulation_dtype(pred, target))


_sample_mse = define_op(
    "sample_mse(Tensor pred, Tensor target, Tensor? weight=None) -> Tensor",
    plain=sample_mse_plain,
    fake=_fake,
)
_sample_mse_backward = define_op(
    "sample_mse_backward(Tensor scale, Tensor pred, Tensor target) -> Tensor",
    plain=sample_mse_backward_plain,
    fake=lambda scale, pred, target: torch.empty_like(pred),
)
refuse_autograd("sample_mse_backward", "the second derivative of the squared error is not implemented")


def pair_gradients(
    scale: Tensor, pred: Tensor, target: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by `pred` and by `target`, given the one by each sample's mean squared error [B].

    The error is symmetric, so the target's gradient is the same formula with the roles exchanged.
    """
    grad_pred = _sample_mse_backward(scale, pred, target) if needed[0] else None
    grad_target = _sample_mse_backward(scale, target, pred) if needed[1] else None
    return grad_pred, grad_target


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    pred, target, weight = ctx.saved_tensors
    scale = grad if weight is None else grad * weight
    return *pair_gradients(scale, pred, target, ctx.needs_input_grad), None


register_autograd("sample_mse", _backward, _setup_context)


def sample_mse(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of every sample, L_b = weight_b · mean over elements of (pred_b − target_b)².

    Args:
        pred: [B, ...], floating point.
        target: of the same shape and device; the dtype may differ (bfloat16 against float32 under autocast).
        weight: [B], floating point, without gradient: loss weights such as Min-SNR's. Default: 1.

    Returns:
        [B], in the promoted dtype of both and float32 at least. Autocast does not change it.

    Raises:
        TypeError: an input is not floating point.
        ValueError: shapes or devices differ, a sample has no elements, or the weight requires a gradient.
    """
    check_pair(pred, target)
    check_weight(weight, pred)
    return _sample_mse(pred, target, weight)
