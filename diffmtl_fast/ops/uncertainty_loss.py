"""`uncertainty_loss`: squared errors of the clusters under learned log-variances, in one scalar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    accumulation_dtype,
    check_cluster,
    check_floating,
    check_pair,
    check_same_device,
    check_weight,
)
from ._library import Kernel, define_op, make_kernel_of, refuse_autograd, register_autograd
from .cluster_mse import cluster_mse_plain
from .sample_mse import sample_mse_backward_plain


def uncertainty_loss_plain(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `uncertainty_loss` and what its gradients are made of.

    Returns:
        Σ_k ½ (e^{−u_k} L_k / n + u_k) over the n present clusters, [];
        its slope by the mean squared error of every sample, weight_b · ½ e^{−u_k} / (n count_k), [B];
        its gradient by u, ½ (1 − e^{−u_k} L_k / n), 0 for an absent cluster, [k].
    """
    losses, counts = cluster_mse_plain(pred, target, cluster, log_var.shape[0], weight)
    u, present = log_var.to(losses.dtype), counts > 0
    shares = torch.where(present, 0.5 * torch.exp(-u) / present.sum(), 0)
    loss = torch.where(present, shares * losses + 0.5 * u, 0).sum()
    slope = (shares / counts.clamp(min=1)).index_select(0, cluster)
    slope = slope if weight is None else slope * weight.to(slope.dtype)
    return loss, slope, torch.where(present, 0.5 - shares * losses, 0).to(log_var.dtype)


def _gradients(sample_mse_backward: Kernel) -> Kernel:
    """Make the gradients by `pred` and by `log_var`, which is named only so that a second one is refused."""

    def backward(
        grad: Tensor, slope: Tensor, log_var_grad: Tensor, log_var: Tensor, pred: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sample_mse_backward(grad * slope, pred, target), grad * log_var_grad

    return backward


def _fake(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    loss = pred.new_empty([], dtype=accumulation_dtype(pred, target))
    return loss, loss.new_empty(pred.shape[:1]), log_var.new_empty(log_var.shape)


_uncertainty_loss = define_op(
    "uncertainty_loss(Tensor pred, Tensor target, Tensor cluster, Tensor log_var, Tensor? weight=None)"
    " -> (Tensor, Tensor, Tensor)",
    plain=uncertainty_loss_plain,
    fake=_fake,
)
_uncertainty_loss_backward = define_op(
    "uncertainty_loss_backward(Tensor grad, Tensor slope, Tensor log_var_grad, Tensor log_var, Tensor pred,"
    " Tensor target) -> (Tensor, Tensor)",
    plain=_gradients(sample_mse_backward_plain),
    fake=lambda grad, slope, log_var_grad, log_var, pred, target: (
        torch.empty_like(pred),
        torch.empty_like(log_var_grad),
    ),
)
make_kernel_of("uncertainty_loss_backward", "sample_mse_backward", _gradients)
refuse_autograd(
    "uncertainty_loss_backward", "the second derivative of the uncertainty loss is not implemented"
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, target, _, log_var, _ = inputs
    _, slope, log_var_grad = output
    ctx.mark_non_differentiable(slope, log_var_grad)
    ctx.save_for_backward(slope, log_var_grad, log_var, pred, target)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *constants, pred, target = ctx.saved_tensors
    grad_pred, grad_log_var = _uncertainty_loss_backward(grad, *constants, pred, target)
    grad_target = None
    if ctx.needs_input_grad[1]:  # the error is symmetric
        grad_target, _ = _uncertainty_loss_backward(grad, *constants, target, pred)
    return grad_pred, grad_target, None, grad_log_var, None


register_autograd("uncertainty_loss", _backward, _setup_context)


def uncertainty_loss(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Squared error under uncertainty weighting, Σ_k ½ (e^{−u_k} L_k / n + u_k) over the n present clusters.

    The same scalar as `UncertaintyWeighting` makes of `cluster_mse`, as one op: the forward reads the prediction
    and the target once, the backward once more for the gradients by both; that by u comes with the forward.

    Args:
        pred: [B, ...], floating point.
        target: of the same shape and device; the dtype may differ.
        cluster: int64 [B], indices in 0..k-1, in any order.
        log_var: u, floating point [k], the learned log-variances.
        weight: [B], floating point, without gradient: loss weights such as Min-SNR's. Default: 1.

    Returns:
        The scalar, in the promoted dtype of `pred` and `target` and float32 at least.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices differ, a sample has no elements, the weight requires a gradient, or (checked
            on the CPU only, where it costs no synchronisation) an index is out of range.
    """
    check_pair(pred, target)
    check_weight(weight, pred)
    check_floating(log_var=log_var)
    if log_var.dim() != 1:
        raise ValueError(f"log_var: expected shape [k], found {list(log_var.shape)}")
    check_same_device(pred=pred, log_var=log_var)
    check_cluster(cluster, log_var.shape[0], pred)
    return _uncertainty_loss(pred, target, cluster, log_var, weight)[0]
