"""Weights from a Gramian by Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import eigh as eigh_kernels
from ...kernels import settings
from ...kernels import weights as weight_kernels
from .._library import run_plain
from ..nash import CONVERGED, LINE_SEARCH_STEPS, NEWTON_STEPS, ridge_unit

# Jacobi's method squares what is outside of the diagonal in every sweep; ten sweeps do for 64 rows.
SWEEPS = 16


def pcgrad_weights(gramian: Tensor, order: Tensor, present: Tensor) -> Tensor:
    """Launch `pcgrad_weights`."""
    k = gramian.shape[0]
    if k > settings.MAX_CLUSTERS:
        return run_plain("pcgrad_weights", f"no kernel for K = {k}", gramian, order, present)
    weights = gramian.new_empty(k)
    tile, num_warps = settings.weight_settings(k)
    weight_kernels._pcgrad_kernel[1,](
        gramian.contiguous(),
        order.contiguous(),
        present.contiguous(),
        weights,
        K=k,
        TILE=tile,
        num_warps=num_warps,
    )
    return weights


def nash_weights(gramian: Tensor, present: Tensor) -> Tensor:
    """Launch `nash_weights`."""
    k = gramian.shape[0]
    float64 = gramian.dtype == torch.float64
    if k > (settings.MAX_FLOAT64_NASH_CLUSTERS if float64 else settings.MAX_CLUSTERS):
        return run_plain("nash_weights", f"no kernel for K = {k} in {gramian.dtype}", gramian, present)
    weights = gramian.new_empty(k)
    tile, num_warps = settings.weight_settings(k, settings.NASH_WARPS)
    weight_kernels._nash_kernel[1,](
        gramian.contiguous(),
        present.contiguous(),
        weights,
        DELTA=ridge_unit(gramian.dtype),
        CONVERGED=CONVERGED,
        K=k,
        TILE=tile,
        NEWTON_STEPS=NEWTON_STEPS,
        LINE_SEARCH_STEPS=LINE_SEARCH_STEPS,
        num_warps=num_warps,
    )
    return weights


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `eigh`."""
    k = matrix.shape[0]
    if k > settings.MAX_CLUSTERS or matrix.dtype != torch.float64:
        return run_plain("eigh", f"no kernel for K = {k} in {matrix.dtype}", matrix)
    values, vectors = matrix.new_empty(k), matrix.new_empty(k, k)
    tile, num_warps = settings.weight_settings(k, tiles=2)
    eigh_kernels._eigh_kernel[1,](
        matrix.contiguous(),
        values,
        vectors,
        K=k,
        TILE=tile,
        SWEEPS=SWEEPS,
        CONVERGED=torch.finfo(torch.float64).eps,
        num_warps=num_warps,
    )
    return values, vectors
