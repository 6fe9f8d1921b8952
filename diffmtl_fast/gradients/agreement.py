"""Whether two ways of running a module give the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layout import flatten


def agree(whole: Any, parts: Any) -> bool:
    """Tell whether two outputs are the same up to rounding."""
    for a, b in zip(flatten(whole)[0], flatten(parts)[0], strict=True):
        if isinstance(a, Tensor):
            if a.shape != b.shape:
                return False
            if a.is_floating_point():
                scale = float(torch.nan_to_num(a.abs()).max()) if a.numel() else 0.0
                tolerance = 100 * torch.finfo(a.dtype).eps ** 0.75 * scale
                if bool(((a - b).abs() > tolerance).any()):
                    return False
    return True


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, where two runs of it are the same."""
    training = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in training:
            m.training = mode
