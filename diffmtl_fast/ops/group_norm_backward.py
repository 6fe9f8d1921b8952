"""The backward of group normalisation, with the gradients of weight and bias of every sample by itself."""

from __future__ import annotations

import math

from torch import Tensor

from ._checks import accumulation_dtype, check_floating, check_same_device
from ._library import define_op, refuse_autograd


def group_norm_backward_plain(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `group_norm_backward` by its definition; without a mean, x was only divided."""
    dtype = accumulation_dtype(grad, x)
    samples, channels = x.shape[:2]
    groups = rstd.shape[1]
    size = math.prod(x.shape[2:])
    slope = grad.to(dtype).contiguous().view(samples, channels, size)
    normal = x.to(dtype).contiguous().view(samples, groups, channels // groups * size)
    if mean is not None:
        normal = normal - mean.to(dtype).unsqueeze(2)
    normal = (normal * rstd.to(dtype).unsqueeze(2)).view_as(slope)
    by_weight, by_bias = (slope * normal).sum(2), slope.sum(2)
    if weight is not None:
        slope = slope * weight.to(dtype).unsqueeze(1)
    slope, normal = (t.view(samples, groups, channels // groups * size) for t in (slope, normal))
    by_x = slope - normal * (slope * normal).mean(2, keepdim=True)
    if mean is not None:
        by_x = by_x - slope.mean(2, keepdim=True)
    by_x = by_x * rstd.to(dtype).unsqueeze(2)
    return by_x.view(x.shape).to(x.dtype), by_weight, by_bias


def _fake(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    by_weight, by_bias = (x.new_empty(x.shape[:2], dtype=accumulation_dtype(grad, x)) for _ in range(2))
    return x.new_empty(x.shape), by_weight, by_bias


def check_normalisation(
    grad: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None
) -> None:
    """Refuse what does not fit the backward of a normalisation."""
    given = {"grad": grad, "x": x, "rstd": rstd}
    for name, tensor in (("mean", mean), ("weight", weight)):
        if tensor is not None:
            given[name] = tensor
    check_floating(**given)
    check_same_device(**given)
    if grad.dtype != x.dtype:
        raise TypeError(f"expected grad and x of one dtype, found {grad.dtype} and {x.dtype}")
    if grad.shape != x.shape or x.dim() < 2:
        raise ValueError(f"expected grad and x [N, C, ...], found {list(grad.shape)} and {list(x.shape)}")
    (samples, channels), moments = x.shape[:2], rstd if mean is None else mean
    groups = rstd.shape[-1] if rstd.dim() == 2 else 0
    if not groups or channels % groups or rstd.shape != (samples, groups) or moments.shape != rstd.shape:
        found = " and ".join(str(list(t.shape)) for t in (mean, rstd) if t is not None)
        raise ValueError(
            f"expected mean and rstd [N, G] = [{samples}, a divisor of {channels}], found {found}"
        )
    if weight is not None and weight.shape != (channels,):
        raise ValueError(f"weight: expected shape [{channels}], found {list(weight.shape)}")


_group_norm_backward = define_op(
    "group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight)"
    " -> (Tensor, Tensor, Tensor)",
    plain=group_norm_backward_plain,
    fake=_fake,
)
refuse_autograd("group_norm_backward", "it is itself part of a backward pass; detach its inputs")


def group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of group normalisation y = w (x − μ) r + b, with weight and bias gradients for every sample.

    With z = (x − μ) r and g the gradient by y: ∂/∂w_nc = Σ g z and ∂/∂b_nc = Σ g over the positions of channel c
    of sample n, and ∂/∂x = r (w g − ⟨w g⟩ − z ⟨w g z⟩), ⟨·⟩ the mean over a group.

    Source: Wu & He, "Group Normalization", ECCV 2018, differentiated.

    Args:
        grad: g, [N, C, ...], floating point.
        x: [N, C, ...], in the same dtype.
        mean: μ, [N, G], floating point; channels are divided into G groups of neighbours.
        rstd: r = 1 / √(variance + ε), [N, G], floating point.
        weight: w, [C], floating point. Default: ones.

    Returns:
        The gradients by x, [N, C, ...] in its dtype and contiguous, by the weight and by the bias, [N, C] each, in
        float32 at least, which is what sums are formed in. Autocast changes nothing.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices do not fit.
        RuntimeError: the result is differentiated.
    """
    check_floating(mean=mean)
    check_normalisation(grad, x, mean, rstd, weight)
    result: tuple[Tensor, Tensor, Tensor] = _group_norm_backward(grad, x, mean, rstd, weight)
    return result
