"""The losses and their gradients on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._native import _C
from .._checks import accumulation_dtype
from .._layout import Result, in_one_order
from .handles import Handle, elements, handle, optional_handle


def _target(first: Tensor, second: Tensor | None, mix: Tensor | None) -> tuple[Handle | None, ...]:
    """Return what a target is formed from: two kinds of elements and their shares."""
    if second is None or mix is None:
        return elements(first), None, None, None
    share, other = mix.unbind(0)
    return elements(first), elements(second), handle(share), handle(other)


def sample_loss(
    pred: Tensor,
    first: Tensor,
    second: Tensor | None,
    mix: Tensor | None,
    weight: Tensor | None,
    delta: float | None,
) -> Tensor:
    """Run `sample_loss`."""
    losses = torch.empty(pred.shape[0], dtype=accumulation_dtype(pred, first))
    (pred, first, second), _ = in_one_order(pred, first, second, strided=True)
    _C.cpu_sample_loss(
        handle(pred),
        *_target(first, second, mix),
        delta,
        pred.shape[0],
        math.prod(pred.shape[1:]),
        optional_handle(weight),
        losses.data_ptr(),
        torch.get_num_threads(),
    )
    return losses


def _loss_gradients(
    scale: Tensor,
    pred: Tensor,
    first: Tensor,
    second: Tensor | None,
    mix: Tensor | None,
    delta: float | None,
    both: bool,
) -> tuple[Tensor, ...]:
    """Write the gradient by `pred` and, of `both`, that by the target `first`, in one pass."""
    (a, b, c), order = in_one_order(pred, first, second, strided=True)
    grads = [Result(leaf, order) for leaf in ((pred, first) if both else (pred,))]
    _C.cpu_sample_loss_backward(
        handle(scale),
        handle(a),
        *_target(b, c, mix),
        delta,
        pred.shape[0],
        math.prod(pred.shape[1:]),
        [grad.written.data_ptr() for grad in grads],
        torch.get_num_threads(),
    )
    return tuple([grad.finish() for grad in grads])


def sample_loss_backward(
    scale: Tensor, pred: Tensor, first: Tensor, second: Tensor | None, mix: Tensor | None, delta: float | None
) -> Tensor:
    """Run `sample_loss_backward`."""
    return _loss_gradients(scale, pred, first, second, mix, delta, both=False)[0]


def sample_mse_backward_both(scale: Tensor, pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Run `sample_mse_backward_both`."""
    return _loss_gradients(scale, pred, target, None, None, None, both=True)


def cluster_mse(
    pred: Tensor, target: Tensor, cluster: Tensor, k: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `cluster_mse`."""
    (pred, target), _ = in_one_order(pred, target, strided=True)
    losses = torch.empty(k, dtype=accumulation_dtype(pred, target))
    counts = torch.empty(k, dtype=torch.int64)
    _C.cpu_cluster_mse(
        handle(pred),
        handle(target),
        pred.shape[0],
        math.prod(pred.shape[1:]),
        cluster.data_ptr(),
        cluster.stride(0),
        k,
        optional_handle(weight),
        losses.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return losses, counts


def cluster_mean(values: Tensor, cluster: Tensor, k: int) -> Tensor:
    """Run `cluster_mean`."""
    means = torch.empty(k, dtype=accumulation_dtype(values))
    _C.cpu_cluster_mean(
        handle(values), values.shape[0], cluster.data_ptr(), cluster.stride(0), k, means.data_ptr()
    )
    return means


def cluster_mean_backward(grad: Tensor, cluster: Tensor) -> Tensor:
    """Run `cluster_mean_backward`."""
    by_values = torch.empty(cluster.shape[0], dtype=grad.dtype)
    _C.cpu_cluster_mean_backward(
        handle(grad),
        grad.shape[0],
        cluster.data_ptr(),
        cluster.stride(0),
        cluster.shape[0],
        by_values.data_ptr(),
    )
    return by_values


def uncertainty_loss(
    pred: Tensor, target: Tensor, cluster: Tensor, log_var: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `uncertainty_loss`."""
    (pred, target), _ = in_one_order(pred, target, strided=True)
    dtype = accumulation_dtype(pred, target)
    loss, slope = torch.empty((), dtype=dtype), torch.empty(pred.shape[0], dtype=dtype)
    log_var_grad = torch.empty(log_var.shape, dtype=log_var.dtype)
    _C.cpu_uncertainty_loss(
        handle(pred),
        handle(target),
        pred.shape[0],
        math.prod(pred.shape[1:]),
        cluster.data_ptr(),
        cluster.stride(0),
        handle(log_var),
        log_var.shape[0],
        optional_handle(weight),
        loss.data_ptr(),
        slope.data_ptr(),
        log_var_grad.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, slope, log_var_grad
