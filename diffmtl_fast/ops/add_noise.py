"""`add_noise`: the forward process, with noise that is given or generated on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_dense, check_floating, check_same_device
from ._library import define_op, register_autograd
from .philox import check_seed, is_seed, philox_normal_plain


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(accumulation_dtype(like)).view(-1, *[1] * (like.dim() - 1))


def add_noise_plain(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Compute `add_noise` by its definition; an integer `noise` is a seed."""
    dtype = accumulation_dtype(x0)
    drawn = philox_normal_plain(noise, x0) if is_seed(noise) else noise
    return (_column(alpha, x0) * x0.to(dtype) + _column(sigma, x0) * drawn.to(dtype)).to(x0.dtype)


_add_noise = define_op(
    "add_noise(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma) -> Tensor",
    plain=add_noise_plain,
    fake=lambda x0, noise, alpha, sigma: torch.empty_like(x0),
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, noise, alpha, sigma = inputs
    ctx.save_for_backward(alpha, sigma)
    ctx.noise_dtype = noise.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    alpha, sigma = ctx.saved_tensors
    grad_x0 = (grad * _column(alpha, grad)).to(grad.dtype) if ctx.needs_input_grad[0] else None
    grad_noise = (grad * _column(sigma, grad)).to(ctx.noise_dtype) if ctx.needs_input_grad[1] else None
    return grad_x0, grad_noise, None, None


register_autograd("add_noise", _backward, _setup_context)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Forward process, x_t = α x0 + σ noise, in one pass.

    Args:
        x0: [B, ...], floating point.
        noise: of the same shape, floating point; or a seed, an int64 scalar tensor: the noise is then generated
            element by element (`philox_normal`) and never stored. `denoising_loss` with the same seed sees the
            same bits.
        alpha: α of each sample, floating point [B], without gradient; ``alphas[t]`` of a table [T].
        sigma: σ of each sample, likewise.

    Returns:
        [B, ...], in the dtype of `x0`; computed in float32 at least.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: shapes or devices differ, or α or σ requires a gradient.
    """
    check_floating(x0=x0, alpha=alpha, sigma=sigma)
    if x0.dim() == 0:
        raise ValueError("x0: expected [B, ...], found a 0-dimensional tensor")
    check_noise(noise, x0)
    check_same_device(x0=x0, alpha=alpha, sigma=sigma)
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if value.shape != x0.shape[:1]:
            raise ValueError(f"{name}: expected shape {list(x0.shape[:1])}, found {list(value.shape)}")
        if value.requires_grad:
            raise ValueError(f"{name}: expected a constant, found a tensor that requires a gradient")
    return _add_noise(x0, noise, alpha, sigma)


def check_noise(noise: Tensor, x0: Tensor) -> None:
    """Refuse anything but noise shaped like `x0` or a seed."""
    check_dense("noise", noise)
    if noise.dtype == torch.int64:
        check_seed(noise, x0)
        return
    check_floating(noise=noise)
    check_same_device(x0=x0, noise=noise)
    if noise.shape != x0.shape:
        raise ValueError(f"noise: expected shape {list(x0.shape)} or a seed, found {list(noise.shape)}")
