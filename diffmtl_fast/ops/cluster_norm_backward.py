"""The backward of layer, RMS and group normalisation, with the gradients of weight and bias of every cluster."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import check_offsets, check_out
from ._library import call, define_op, refuse_autograd_in_place
from .cluster_sum import cluster_sum_out_plain
from .group_norm_backward import check_normalisation, group_norm_backward_plain


def cluster_norm_backward_plain(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor,
    by_weight: Tensor | None,
    by_bias: Tensor | None,
    accumulate: tuple[bool, bool],
) -> Tensor:
    """Compute `cluster_norm_backward` by its definition."""
    by_x, *by_sample = group_norm_backward_plain(grad, x, mean, rstd, weight)
    for values, out, add in zip(by_sample, (by_weight, by_bias), accumulate, strict=True):
        if out is not None:
            cluster_sum_out_plain(values, offsets, out, add)
    return by_x


def _fake(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


_cluster_norm_backward = define_op(
    "cluster_norm_backward(Tensor grad, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, Tensor offsets, "
    "Tensor(a!)? by_weight, Tensor(b!)? by_bias, bool[2] accumulate) -> Tensor",
    plain=cluster_norm_backward_plain,
    fake=_fake,
)
refuse_autograd_in_place("cluster_norm_backward", "it is itself part of a backward pass; detach its inputs")


def cluster_norm_backward_unchecked(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor,
    by_weight: Tensor | None,
    by_bias: Tensor | None,
    accumulate: tuple[bool, bool] = (False, False),
) -> Tensor:
    """Return `cluster_norm_backward` where no gradient is recorded, of arguments known to be as it expects."""
    result: Tensor = call(
        _cluster_norm_backward,
        "cluster_norm_backward",
        grad,
        x,
        mean,
        rstd,
        weight,
        offsets,
        by_weight,
        by_bias,
        accumulate,
    )
    return result


def cluster_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    offsets: Tensor,
    *,
    by_weight: Tensor | None = None,
    by_bias: Tensor | None = None,
    accumulate: tuple[bool, bool] = (False, False),
) -> Tensor:
    """Backward of a normalisation y = w (x − μ) r + b, with weight and bias gradients for every cluster.

    It is `group_norm_backward` whose gradients by w and b are summed over the samples of each cluster. Layer
    normalisation over D elements is that of [N, D] with one group, which takes one pass over the data; RMS
    normalisation is the same without μ: ∂/∂x = r (w g − z ⟨w g z⟩) with z = x r.

    Sources: Wu & He, "Group Normalization", ECCV 2018; Ba et al., "Layer Normalization", 2016; Zhang & Sennrich,
    "Root Mean Square Layer Normalization", NeurIPS 2019; differentiated.

    Args:
        grad: g, [N, C, ...], floating point; samples in the order of their clusters.
        x: [N, C, ...], in the same dtype.
        mean: μ, [N, G], floating point; channels are divided into G groups of neighbours. None: x was not moved.
        rstd: r, [N, G], floating point: what x − μ was multiplied by.
        weight: w, [C], floating point. None: ones.
        offsets: int64 [K + 1]; cluster k has the samples offsets[k] … offsets[k + 1] − 1, so that offsets[0] = 0
            and offsets[K] = N. On the CPU, where they are checked, or beside x.
        by_weight: [K, C], floating point, of any dtype and strides: where to put the gradients by w; zeros for an
            empty cluster. None: they are not wanted.
        by_bias: the same for b.
        accumulate: whether to add to `by_weight`, and to `by_bias`, instead of overwriting them.

    Returns:
        The gradient by x, [N, C, ...] in its dtype and contiguous. Sums are formed in float32 at least, and the
        same inputs give the same bits. Autocast changes nothing.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices do not fit, offsets on the CPU do not divide N samples, or an output overlaps
            itself.
        RuntimeError: an input requires a gradient.
    """
    check_normalisation(grad, x, mean, rstd, weight)
    check_offsets(offsets, x)
    outputs = {"by_weight": by_weight, "by_bias": by_bias}
    for name, out in outputs.items():
        if out is not None:
            check_out(out, (offsets.shape[0] - 1, x.shape[1]), name, x=x)
    result: Tensor = _cluster_norm_backward(
        grad, x, mean, rstd, weight, offsets, by_weight, by_bias, accumulate
    )
    return result
