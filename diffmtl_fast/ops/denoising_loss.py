"""`denoising_loss` and `sample_huber`: per-sample losses whose target is never materialised."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .._data_at import DataAt, check_data_at
from ._checks import accumulation_dtype, check_floating, check_pair, check_same_device, check_weight
from ._library import define_op, refuse_autograd, register_autograd
from .add_noise import check_noise
from .philox import is_seed, philox_normal_plain

Prediction: TypeAlias = Literal["epsilon", "x0", "v", "velocity", "sample", "v_prediction"]

_DIFFUSERS = {"sample": "x0", "v_prediction": "v"}  # diffusers' names


def _error(pred: Tensor, first: Tensor, second: Tensor | None, mix: Tensor | None) -> Tensor:
    """Return pred − first or pred − (mix[0] · first + mix[1] · second), in the dtype that sums are formed in.

    An integer instead of a tensor is the seed of the noise that is meant.
    """
    dtype = accumulation_dtype(pred, first)

    def elements(tensor: Tensor) -> Tensor:
        return (philox_normal_plain(tensor, pred) if is_seed(tensor) else tensor).to(dtype)

    if second is None or mix is None:
        return elements(pred) - elements(first)
    share, other = mix.to(dtype).view(2, -1, *[1] * (pred.dim() - 1)).unbind(0)
    return elements(pred) - (share * elements(first) + other * elements(second))


def sample_loss_plain(
    pred: Tensor,
    first: Tensor,
    second: Tensor | None,
    mix: Tensor | None,
    weight: Tensor | None,
    delta: float | None,
) -> Tensor:
    """Compute the per-sample loss by its definition."""
    error = _error(pred, first, second, mix)
    if delta is None:
        elements = error.square()
    else:
        size = error.abs()
        elements = torch.where(size <= delta, 0.5 * error.square(), delta * (size - 0.5 * delta))
    losses = elements.unsqueeze(-1).flatten(1).mean(1)
    return losses if weight is None else losses * weight.to(losses.dtype)


def sample_loss_backward_plain(
    scale: Tensor, pred: Tensor, first: Tensor, second: Tensor | None, mix: Tensor | None, delta: float | None
) -> Tensor:
    """Compute the gradient by `pred`: scale / numel per sample times 2 error, or the error clamped to ±delta."""
    error = _error(pred, first, second, mix)
    slope = 2 * error if delta is None else error.clamp(-delta, delta)
    factor = scale.to(error.dtype) / math.prod(pred.shape[1:])
    return (slope * factor.view(-1, *[1] * (pred.dim() - 1))).to(pred.dtype)


_sample_loss = define_op(
    "sample_loss(Tensor pred, Tensor first, Tensor? second, Tensor? mix, Tensor? weight, float? delta) -> Tensor",
    plain=sample_loss_plain,
    fake=lambda pred, first, *_: pred.new_empty(pred.shape[:1], dtype=accumulation_dtype(pred, first)),
)
_sample_loss_backward = define_op(
    "sample_loss_backward(Tensor scale, Tensor pred, Tensor first, Tensor? second, Tensor? mix, float? delta)"
    " -> Tensor",
    plain=sample_loss_backward_plain,
    fake=lambda scale, pred, *_: torch.empty_like(pred),
)
refuse_autograd("sample_loss_backward", "the second derivative of the denoising loss is not implemented")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, delta = inputs
    ctx.save_for_backward(*tensors)
    ctx.delta = delta


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pred, first, second, mix, weight = ctx.saved_tensors
    scale = grad if weight is None else grad * weight
    return _sample_loss_backward(scale, pred, first, second, mix, ctx.delta), None, None, None, None, None


register_autograd("sample_loss", _backward, _setup_context)


def sample_huber(pred: Tensor, target: Tensor, delta: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """Huber loss of every sample: the mean over elements of ½ e² where |e| <= δ, of δ (|e| − ½ δ) beyond.

    Args:
        pred: [B, ...], floating point; e = pred − target.
        target: of the same shape and device, without gradient; the dtype may differ.
        delta: δ > 0, in the unit of `pred`.
        weight: [B], floating point, without gradient. Default: 1.

    Returns:
        [B], in the promoted dtype of both and float32 at least.

    Raises:
        TypeError: an input is not floating point.
        ValueError: shapes or devices differ, δ is not positive, or a constant requires a gradient.
    """
    check_pair(pred, target)
    check_weight(weight, pred)
    _check_constant(target=target)
    _check_delta(delta)
    return _sample_loss(pred, target, None, None, weight, delta)


def denoising_loss(
    pred: Tensor,
    x0: Tensor,
    noise: Tensor,
    *,
    prediction: Prediction,
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
    weight: Tensor | None = None,
    huber_delta: float | None = None,
    data_at: DataAt = 0,
) -> Tensor:
    """Loss of every sample against the target of a prediction type, formed element by element on the way.

    With x_t = α x0 + σ noise the targets are: epsilon, the noise; x0, the image; v, α noise − σ x0 (Salimans &
    Ho, "Progressive Distillation", ICLR 2022); velocity, noise − x0 (rectified flow, x_t = (1 − σ) x0 + σ noise).

    Args:
        pred: [B, ...], floating point, the model's output.
        x0: of the same shape and device, without gradient.
        noise: likewise, of the dtype of `x0`; or the seed that `add_noise` was given, an int64 scalar tensor: the
            noise is then generated once more, bit for bit, instead of having been stored.
        prediction: ``"epsilon"``, ``"x0"``, ``"v"`` or ``"velocity"``; diffusers' ``"sample"`` is x0, its
            ``"v_prediction"`` v.
        alpha: α of each sample, floating point [B] or [B, 1, …, 1]; for v alone.
        sigma: σ of each sample, likewise.
        weight: [B], floating point, without gradient: loss weights such as Min-SNR's. Default: 1.
        huber_delta: the Huber loss with this δ > 0 instead of the squared error.
        data_at: the time of the data in flow matching. 1, as in SiT, where x_t = t x0 + (1 − t) noise, turns the
            velocity round: x0 − noise.

    Returns:
        [B], in the promoted dtype of `pred` and of what it is compared with (generated noise is float32), float32
        at least; average it by `cluster_mean`.

    Raises:
        TypeError: an input is not floating point.
        ValueError: shapes or devices differ, the prediction type is unknown or lacks α and σ, δ is not positive,
            or a constant requires a gradient.
    """
    check_pair(pred, x0, "x0")
    check_noise(noise, x0)
    check_weight(weight, pred)
    _check_constant(x0=x0, noise=noise)
    if not is_seed(noise) and x0.dtype != noise.dtype:
        raise TypeError(f"noise: expected the dtype of x0, {x0.dtype}, found {noise.dtype}")
    if huber_delta is not None:
        _check_delta(huber_delta)
    check_data_at(data_at)
    prediction = _DIFFUSERS.get(prediction, prediction)  # type: ignore[assignment]
    if data_at == 1 and prediction != "velocity":
        raise ValueError(f"data_at: expected 0 for prediction {prediction!r}, which has no times, found 1")
    if prediction == "epsilon":
        return _sample_loss(pred, noise, None, None, weight, huber_delta)
    if prediction == "x0":
        return _sample_loss(pred, x0, None, None, weight, huber_delta)
    mix = _velocity_mix(pred, prediction, alpha, sigma, data_at)
    return _sample_loss(pred, x0, noise, mix, weight, huber_delta)


def _velocity_mix(
    pred: Tensor, prediction: str, alpha: Tensor | None, sigma: Tensor | None, data_at: DataAt
) -> Tensor:
    """Return the shares of x0 and of the noise in the target, float [2, B]."""
    if prediction == "velocity":
        ones = torch.ones(pred.shape[0], dtype=torch.float32, device=pred.device)
        return torch.stack([-ones, ones] if data_at == 0 else [ones, -ones])
    if prediction != "v":
        raise ValueError(f"prediction: expected 'epsilon', 'x0', 'v' or 'velocity', found {prediction!r}")
    if alpha is None or sigma is None:
        raise ValueError("alpha, sigma: expected both for prediction 'v', found None")
    check_floating(alpha=alpha, sigma=sigma)
    check_same_device(pred=pred, alpha=alpha, sigma=sigma)
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if value.shape[:1] != pred.shape[:1] or any(size != 1 for size in value.shape[1:]):
            raise ValueError(
                f"{name}: expected shape {list(pred.shape[:1])}, or 1 in all other dimensions, found "
                f"{list(value.shape)}"
            )
    _check_constant(alpha=alpha, sigma=sigma)
    return torch.stack([-sigma.flatten(), alpha.flatten()])


def _check_constant(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a constant, found a tensor that requires a gradient")


def _check_delta(delta: float) -> None:
    if not 0 < delta < math.inf:
        raise ValueError(f"delta: expected a positive number, found {delta}")
