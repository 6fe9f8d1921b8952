"""The forward process and generated noise on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._native import _C
from .._layout import Result, in_one_order
from .handles import elements, handle


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Run `add_noise`."""
    (image, drawn), order = in_one_order(x0, noise, strided=True)
    noisy = Result(x0, order)
    _C.cpu_add_noise(
        handle(image),
        elements(drawn),
        handle(alpha),
        handle(sigma),
        x0.shape[0],
        math.prod(x0.shape[1:]),
        noisy.written.data_ptr(),
        torch.get_num_threads(),
    )
    return noisy.finish()


def philox_normal(seed: Tensor, like: Tensor) -> Tensor:
    """Run `philox_normal`."""
    noise = torch.empty(like.shape, dtype=torch.float32)
    _C.cpu_philox_normal(
        elements(seed), like.shape[0], math.prod(like.shape[1:]), noise.data_ptr(), torch.get_num_threads()
    )
    return noise
