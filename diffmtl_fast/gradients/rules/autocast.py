"""Casts a rule's arguments as autocast would for that kind of operation."""

from __future__ import annotations

import torch
from torch import Tensor


def lower_precision(tensor: Tensor) -> Tensor:
    """Cast as autocast does for matrix products and convolutions."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def norm_precision(tensor: Tensor) -> Tensor:
    """Cast as autocast does for normalisation: to float32 on CUDA, not at all on the CPU."""
    device = tensor.device.type
    lower = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if lower and device != "cpu" and torch.is_autocast_enabled(device) else tensor
