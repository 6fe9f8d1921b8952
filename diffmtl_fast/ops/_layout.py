"""How tensors lie in memory, as far as the kernels care."""

from __future__ import annotations

import torch
from torch import Tensor

# The memory formats other than row-major in which a sample's elements still lie together.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_rows(jacobian: Tensor) -> Tensor:
    """Return J with the elements of a row next to each other, itself where it is so already."""
    return jacobian if jacobian.shape[1] <= 1 or jacobian.stride(1) == 1 else jacobian.contiguous()
