"""What a compiled kernel is told of a tensor: no tensor crosses the language border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from ..._native import _C
from .._checks import FLOATING, ByDtype
from ..philox import is_seed

# The numbers that csrc knows the dtypes by.
DTYPES = ByDtype({dtype: number for number, dtype in enumerate(FLOATING)})

# Address, dtype and distance between the entries of the first dimension.
Handle: TypeAlias = tuple[int, int, int]


def handle(tensor: Tensor) -> Handle:
    """Return the handle of a tensor."""
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0)


def optional_handle(tensor: Tensor | None) -> Handle | None:
    """Return the handle of a tensor that may be missing."""
    return None if tensor is None else handle(tensor)


def elements(tensor: Tensor) -> Handle:
    """Return the handle of a tensor or of the noise that a seed stands for."""
    return (tensor.data_ptr(), _C.CPU_SEED, 0) if is_seed(tensor) else handle(tensor)


def members(parts: Sequence[Tensor], k: int) -> list[tuple[int, int, int, int]]:
    """Return address, dtype, row stride and columns of every part."""
    return [(rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), rows.numel() // k) for rows in parts]
