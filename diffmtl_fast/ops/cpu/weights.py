"""Weights from a Gramian on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import _C
from ..nash import CONVERGED, LINE_SEARCH_STEPS, NEWTON_STEPS, ridge_unit
from .handles import handle


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
