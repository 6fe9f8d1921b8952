"""Marks functions that torch.compile calls without tracing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_disabled: dict[Callable[..., Any], Callable[..., Any]] = {}


def uncompiled(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """Return a function that breaks the graphs of compiled code that calls it.

    Made where a compiler is there anyway: to import one with the package would take seconds.

    Args:
        function: any function.
        reason: why, for the compiler's messages.
    """
    if function not in _disabled:
        _disabled[function] = torch.compiler.disable(function, reason=reason)
    return _disabled[function]
