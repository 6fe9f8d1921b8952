"""`sample_mse`: the mean squared error of every sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_pair, check_weight
from ._library import define_op, make_kernel_of, refuse_autograd, register_autograd


def sample_mse_plain(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute `sample_mse` by its definition."""
    dtype = accumulation_dtype(pred, target)
    # The trailing axis lets one line serve [B] as well as [B, ...].
    losses = (pred.to(dtype) - target.to(dtype)).square().unsqueeze(-1).flatten(1).mean(1)
    return losses if weight is None else losses * weight.to(dtype)


def sample_mse_backward_plain(scale: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    """Compute 2 (pred − target) scale / numel per sample, [B, ...], in the dtype of `pred`."""
    dtype = accumulation_dtype(pred, target)
    factor = scale.to(dtype) / math.prod(pred.shape[1:])
    slope = 2 * (pred.to(dtype) - target.to(dtype))
    return (slope * factor.view(-1, *[1] * (pred.dim() - 1))).to(pred.dtype)


def sample_mse_backward_both_plain(scale: Tensor, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients by `pred` and by `target`, each in its own dtype.

    The error is symmetric: the target's gradient is the same formula with the roles exchanged.
    """
    return (
        sample_mse_backward_plain(scale, pred, target),
        sample_mse_backward_plain(scale, target, pred),
    )


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
_sample_mse_backward_both = define_op(
    "sample_mse_backward_both(Tensor scale, Tensor pred, Tensor target) -> (Tensor, Tensor)",
    plain=sample_mse_backward_both_plain,
    fake=lambda scale, pred, target: (torch.empty_like(pred), torch.empty_like(target)),
)
make_kernel_of(
    "sample_mse",
    "sample_loss",
    lambda kernel: lambda pred, target, weight=None: kernel(pred, target, None, None, weight, None),
)
make_kernel_of(
    "sample_mse_backward",
    "sample_loss_backward",
    lambda kernel: lambda scale, pred, target: kernel(scale, pred, target, None, None, None),
)
for _name in ("sample_mse_backward", "sample_mse_backward_both"):
    refuse_autograd(_name, "the second derivative of the squared error is not implemented")


def pair_gradients(
    scale: Tensor, pred: Tensor, target: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by `pred` and by `target`, given the one by each sample's mean squared error [B]."""
    if needed[0] and needed[1]:
        both: tuple[Tensor, Tensor] = _sample_mse_backward_both(scale, pred, target)
        return both
    if needed[1]:
        return None, _sample_mse_backward(scale, target, pred)
    return _sample_mse_backward(scale, pred, target) if needed[0] else None, None


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
