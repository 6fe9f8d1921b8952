"""`uncertainty_loss`: squared errors of the clusters under learned log-variances, in one scalar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_cluster, check_floating, check_pair, check_same_device, check_weight
from ._library import define_op, register_autograd
from .cluster_mse import _cluster_mse
from .sample_mse import pair_gradients


def uncertainty_terms(losses: Tensor, counts: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh the cluster losses: the scalar, its slope by the squared error of one sample, its gradient by u.

    Args:
        losses: L, [k].
        counts: samples per cluster, int64 [k].
        log_var: u, [k].

    Returns:
        Σ_k ½ (e^{−u_k} L_k / n + u_k) over the n present clusters, [];
        ½ e^{−u_k} / (n count_k), [k], 0 for an absent cluster;
        ½ (1 − e^{−u_k} L_k / n), [k], 0 for an absent cluster.
    """
    present = counts > 0
    weights = torch.where(present, 0.5 * torch.exp(-log_var.to(losses.dtype)) / present.sum(), 0)
    weighted = weights * losses
    loss = (weighted + torch.where(present, 0.5 * log_var, 0)).sum()
    return loss, weights / counts.clamp(min=1), torch.where(present, 0.5 - weighted, 0).to(log_var.dtype)


def uncertainty_loss_plain(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `uncertainty_loss` from the cluster losses, with the device's own kernel for those."""
    losses, counts = _cluster_mse(pred, target, cluster, log_var.shape[0], weight)
    return uncertainty_terms(losses, counts, log_var)


def _fake(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    losses, counts = _cluster_mse(pred, target, cluster, log_var.shape[0], weight)
    return uncertainty_terms(losses, counts, log_var)


_uncertainty_loss = define_op(
    "uncertainty_loss(Tensor pred, Tensor target, Tensor cluster, Tensor log_var, Tensor? weight=None)"
    " -> (Tensor, Tensor, Tensor)",
    plain=uncertainty_loss_plain,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, target, cluster, _, weight = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(pred, target, cluster, weight, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    pred, target, cluster, weight, slope, grad_log_var = ctx.saved_tensors
    scale = (grad * slope)[cluster]
    scale = scale if weight is None else scale * weight
    return *pair_gradients(scale, pred, target, ctx.needs_input_grad), None, grad * grad_log_var, None


register_autograd("uncertainty_loss", _backward, _setup_context)


def uncertainty_loss(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Squared error under uncertainty weighting, Σ_k ½ (e^{−u_k} L_k / n + u_k) over the n present clusters.

    The same scalar as `UncertaintyWeighting` makes of `cluster_mse`, as one op: the forward reads the prediction
    and the target once, the backward once more for both gradients.

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
    check_same_device(pred=pred, cluster=cluster, log_var=log_var)
    check_cluster(cluster, log_var.shape[0], pred.shape[0])
    return _uncertainty_loss(pred, target, cluster, log_var, weight)[0]
