"""Gramians and combinations of the rows of a Jacobian by Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import combine as combine_kernels
from ...kernels import gram as gram_kernels
from ...kernels import settings
from .._checks import accumulation_dtype
from .._layout import copy_back, dense_outputs, dense_rows, empty_row, rows_like
from .._library import run_plain
from .launches import SUM_DTYPES, TRITON_DTYPES, Launch, add_up, plan


def _uncovered(k: int) -> str | None:
    """Say why no kernel covers so many rows, if so."""
    return None if 1 <= k <= settings.MAX_CLUSTERS else f"no kernel for K = {k}"


def gram(jacobian: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Launch `gram`: partial Gramians of blocks of columns, and their sum."""
    k, total = jacobian[0].shape[0], dtype or accumulation_dtype(*jacobian)
    if reason := _uncovered(k):
        return run_plain("gram", reason, jacobian, dtype)
    few = k <= settings.MAX_VECTOR_CLUSTERS
    if not few and any(member.dtype == torch.float64 for member in jacobian):
        return run_plain("gram", f"no kernel for K = {k} in {total}", jacobian, dtype)
    parts = [dense_rows(member) for member in jacobian]
    partial = []
    for launch in plan(parts, parts, [False] * len(parts)):
        if few:
            partial.append(_gram_vectors(launch, k, dtype or accumulation_dtype(launch.rows[0])))
        else:
            partial.append(_gram_tiles(launch, k, total))
    return add_up(partial, k, total, jacobian[0].device)


def _gram_vectors(launch: Launch, k: int, dtype: torch.dtype) -> Tensor:
    block, num_warps = settings.gram_settings(k, launch.longest, dtype.itemsize, launch.aligned)
    programs = launch.programs(block)
    partial = torch.empty(k, k, programs, dtype=dtype, device=launch.device)
    gram_kernels._gram_vector_kernel[programs,](
        **launch.arguments(block),
        p_partial=partial,
        K=k,
        BLOCK=block,
        ACCUMULATE=SUM_DTYPES[dtype],
        num_warps=num_warps,
    )
    return partial


def _gram_tiles(launch: Launch, k: int, dtype: torch.dtype) -> Tensor:
    block, num_warps = settings.gram_settings(k, launch.longest, 4, launch.aligned)
    run = settings.ceil_div(launch.columns, settings.TILE_PROGRAMS * block)
    programs = launch.programs(run * block)
    partial = torch.empty(k, k, programs, dtype=dtype, device=launch.device)
    gram_kernels._gram_tile_kernel[programs,](
        **launch.arguments(run * block),
        p_partial=partial,
        run=run,
        K=k,
        TILE=max(16, settings.power_of_two(k)),
        BLOCK=block,
        ACCUMULATE=SUM_DTYPES[dtype],
        PRECISION="ieee" if launch.dtype == torch.float32 else "tf32",
        num_warps=num_warps,
    )
    return partial


def combine(jacobian: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Launch `combine`."""
    if reason := _uncovered(weights.shape[0]):
        return run_plain("combine", reason, jacobian, weights)
    out = [empty_row(member) for member in jacobian]
    parts = [rows_like(member, written) for member, written in zip(jacobian, out, strict=True)]
    for launch in plan(parts, out, [False] * len(out)):
        _combine(launch, weights.contiguous())
    return out


def combine_(
    out: Sequence[Tensor], jacobian: Sequence[Tensor], weights: Tensor, accumulate: Sequence[bool]
) -> Tensor:
    """Launch `combine_`: blocks of columns, and the sum of their squared norms."""
    if reason := _uncovered(weights.shape[0]):
        return run_plain("combine_", reason, out, jacobian, weights, accumulate)
    dense = dense_outputs(out)
    parts = [rows_like(member, written) for member, written in zip(jacobian, dense, strict=True)]
    squares = [_combine(launch, weights.contiguous()) for launch in plan(parts, dense, accumulate)]
    copy_back(dense, out)
    return add_up(squares, 1, torch.float64, weights.device).view(())


def _combine(launch: Launch, weights: Tensor) -> Tensor:
    block, num_warps = settings.stream_settings(launch.longest)
    dtype, programs = accumulation_dtype(launch.rows[0], launch.outputs[0]), launch.programs(block)
    squares = torch.empty(1, 1, programs, dtype=torch.float64, device=launch.device)
    combine_kernels._combine_kernel[programs,](
        **launch.arguments(block),
        p_weight=weights,
        p_out=launch.outputs[0],
        p_square=squares,
        K=weights.shape[0],
        BLOCK=block,
        ACCUMULATE=SUM_DTYPES[dtype],
        OUT_DTYPE=TRITON_DTYPES[launch.out_dtype],
        ADD=launch.adds,
        num_warps=num_warps,
    )
    return squares
