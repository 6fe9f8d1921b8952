"""The compiled kernels behind the ops on CPU tensors: what each is given.

Every function has the name of its op and the signature of its plain definition, and takes what the op's public
function has checked. Where a kernel does not cover an input, that definition is used and the reason is logged
once. Kernels run on PyTorch's threads (`torch.set_num_threads`), and their number changes no bit of a result. Nor
does the instruction set where nothing is added up over elements: of noise, noisy images and the gradients of
losses.

The kernels are compiled for several instruction sets and the best one that the processor has is used; the
environment variable ``DIFFMTL_CPU_KERNELS`` (``plain``, ``avx2``, ``avx512``), read at import, chooses another.
"""

from __future__ import annotations

import os

from ..._native import _C
from .._library import Kernel, kernels_in
from . import jacobian, layers, losses, noise, weights


def kernels() -> dict[str, Kernel]:
    """Return all kernels by the names of their ops, once these are defined."""
    return kernels_in(losses, noise, jacobian, layers, weights)


def select_instruction_set() -> str:
    """Use the instruction set that ``DIFFMTL_CPU_KERNELS`` names, else the best one, and return its name.

    Raises:
        ValueError: this processor does not have it.
    """
    name: str = _C.cpu_select_kernels(os.environ.get("DIFFMTL_CPU_KERNELS"))
    return name
