"""The Triton kernels behind the ops on CUDA (and ROCm) tensors: how each is launched.

Every launcher has the name of its op and the signature of its plain definition. Where a kernel does not cover an
input, the launcher hands it to that definition and the reason is logged once.
"""

from __future__ import annotations

from .._library import Kernel, kernels_in
from . import jacobian, layers, losses, noise, weights


def kernels() -> dict[str, Kernel]:
    """Return all kernels by the names of their ops, once these are defined."""
    return kernels_in(losses, noise, jacobian, layers, weights)
