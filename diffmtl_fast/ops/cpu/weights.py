"""Weights from a Gramian on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native import _C
from .._checks import FLOATING, ByDtype
from .._library import run_plain
from ..gradvac import LARGEST
from ..nash import CONVERGED, LINE_SEARCH_STEPS, NEWTON_STEPS, ridge_unit
from .handles import handle

_METHODS = frozenset(_C.CPU_GRAMIAN_METHODS)
# Asking PyTorch takes as long as the rest of a call's preparation.
_UNITS = ByDtype({dtype: torch.finfo(dtype).eps for dtype in FLOATING})


def _address(present: Tensor | None) -> int:
    return 0 if present is None else present.data_ptr()


def pcgrad_weights(gramian: Tensor, order: Tensor, present: Tensor) -> Tensor:
    """Run `pcgrad_weights`."""
    gramian, order, present = gramian.contiguous(), order.contiguous(), present.contiguous()
    weights = torch.empty(gramian.shape[0], dtype=gramian.dtype)
    _C.cpu_pcgrad_weights(
        handle(gramian), gramian.shape[0], order.data_ptr(), present.data_ptr(), weights.data_ptr()
    )
    return weights


def nash_weights(gramian: Tensor, present: Tensor) -> Tensor:
    """Run `nash_weights`."""
    gramian, present = gramian.contiguous(), present.contiguous()
    weights = torch.empty(gramian.shape[0], dtype=gramian.dtype)
    _C.cpu_nash_weights(
        handle(gramian),
        gramian.shape[0],
        ridge_unit(gramian.dtype),
        present.data_ptr(),
        NEWTON_STEPS,
        LINE_SEARCH_STEPS,
        CONVERGED,
        weights.data_ptr(),
    )
    return weights


def gramian_weights(
    gramian: Tensor, present: Tensor | None, method: str, settings: Sequence[float]
) -> Tensor:
    """Run `gramian_weights`."""
    if method not in _METHODS:
        return run_plain("gramian_weights", f"no kernel for {method}", gramian, present, method, settings)
    gramian, present = gramian.contiguous(), None if present is None else present.contiguous()
    k, unit = gramian.shape[0], _UNITS[gramian.dtype]
    weights = torch.empty(k, dtype=gramian.dtype)
    _C.cpu_gramian_weights(handle(gramian), k, _address(present), method, unit, settings, weights.data_ptr())
    return weights


def gradvac_weights(
    gramian: Tensor, order: Tensor, present: Tensor | None, targets: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Run `gradvac_weights`."""
    gramian, order, present = (
        gramian.contiguous(),
        order.contiguous(),
        None if present is None else present.contiguous(),
    )
    weights, moved = (
        torch.empty(gramian.shape[0], dtype=gramian.dtype),
        targets.clone(memory_format=torch.contiguous_format),
    )
    _C.cpu_gradvac_weights(
        handle(gramian),
        gramian.shape[0],
        order.data_ptr(),
        _address(present),
        moved.data_ptr(),
        beta,
        LARGEST,
        weights.data_ptr(),
    )
    return weights, moved
