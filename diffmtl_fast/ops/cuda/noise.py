"""The forward process and generated noise by Triton."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels import noise as noise_kernels
from ...kernels import settings
from .._checks import accumulation_dtype
from .._layout import Result, in_one_order
from ..philox import is_seed
from .launches import SUM_DTYPES


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Launch `add_noise`."""
    tensors, order = in_one_order(x0, noise, strided=False)
    noisy = Result(x0, order)
    if x0.numel() == 0:
        return noisy.finish()
    batch, size = x0.shape[0], math.prod(x0.shape[1:])
    block, num_warps = settings.stream_settings(size)
    chunks = settings.ceil_div(size, block)
    noise_kernels._add_noise_kernel[batch * chunks,](
        *tensors,
        alpha.contiguous(),
        sigma.contiguous(),
        noisy.written,
        size,
        chunks,
        SEEDED=is_seed(noise),
        BLOCK=block,
        ACCUMULATE=SUM_DTYPES[accumulation_dtype(x0)],
        num_warps=num_warps,
    )
    return noisy.finish()


def philox_normal(seed: Tensor, like: Tensor) -> Tensor:
    """Launch `philox_normal`."""
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    if like.numel():
        size = math.prod(like.shape[1:])
        block, num_warps = settings.stream_settings(size)
        chunks = settings.ceil_div(size, block)
        noise_kernels._philox_normal_kernel[like.shape[0] * chunks,](
            seed, out, size, chunks, BLOCK=block, num_warps=num_warps
        )
    return out
