"""Gramians and combinations of the rows of a Jacobian on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native import _C
from .._checks import accumulation_dtype
from .._layout import copy_back, dense_outputs, dense_rows, empty_row, rows_like
from .._library import run_plain
from .handles import DTYPES, handle, members


def _uncovered(k: int) -> str | None:
    """Say why no kernel covers so many rows, if so."""
    return None if 1 <= k <= _C.CPU_MAX_ROWS else f"expected 1 to {_C.CPU_MAX_ROWS} rows, found {k}"


def gram(jacobian: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Run `gram`."""
    k = jacobian[0].shape[0]
    if k == 0:
        return run_plain("gram", "expected at least 1 row, found 0", jacobian, dtype)
    gramian = torch.empty(k, k, dtype=dtype or accumulation_dtype(*jacobian))
    parts = [dense_rows(member) for member in jacobian]  # kept while the kernel reads their memory
    kernel = _C.cpu_gram if k <= _C.CPU_MAX_ROWS else _C.cpu_gram_panels
    products = DTYPES[dtype or torch.float32]  # at least
    kernel(members(parts, k), k, products, gramian.data_ptr(), DTYPES[gramian.dtype], torch.get_num_threads())
    return gramian


def combine(jacobian: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Run `combine`."""
    if reason := _uncovered(weights.shape[0]):
        plain: list[Tensor] = run_plain("combine", reason, jacobian, weights)
        return plain
    out = [empty_row(member) for member in jacobian]
    _write_combination(out, jacobian, weights, [False] * len(out))
    return out


def combine_(
    out: Sequence[Tensor], jacobian: Sequence[Tensor], weights: Tensor, accumulate: Sequence[bool]
) -> Tensor:
    """Run `combine_`."""
    if reason := _uncovered(weights.shape[0]):
        return run_plain("combine_", reason, out, jacobian, weights, accumulate)
    dense = dense_outputs(out)
    square = _write_combination(dense, jacobian, weights, accumulate)
    copy_back(dense, out)
    return torch.tensor(square, dtype=torch.float64)


def _write_combination(
    dense: Sequence[Tensor], jacobian: Sequence[Tensor], weights: Tensor, accumulate: Sequence[bool]
) -> float:
    """Write the weighted sums into dense tensors; return their squared norm."""
    parts = [rows_like(member, written) for member, written in zip(jacobian, dense, strict=True)]
    square: float = _C.cpu_combine(
        [
            (written.data_ptr(), DTYPES[written.dtype], add)
            for written, add in zip(dense, accumulate, strict=True)
        ],
        members(parts, weights.shape[0]),
        weights.shape[0],
        handle(weights),
        torch.get_num_threads(),
    )
    return square
