"""Gradients of every difficult kind, at any scale, for the weightings that work on their Gramian."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

NUMBER = 10_000 if os.environ.get("DIFFMTL_CAMPAIGN") == "1" else 200
KINDS = ("ordinary", "few dimensions", "duplicated", "opposed", "lengths over six decades", "nearly parallel")


def jacobian(kind: str, k: int, generator: torch.Generator) -> Tensor:
    """Draw k gradients of a kind, float64 [k, P]."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = normal(k, max(1, k // 2) if kind == "few dimensions" else 2 * k)
    if kind in ("duplicated", "opposed"):
        rows[1] = rows[0] if kind == "duplicated" else -2 * rows[0]
    if kind == "lengths over six decades":
        rows *= 10 ** (6 * torch.rand(k, 1, generator=generator, dtype=torch.float64) - 3)
    if kind == "nearly parallel":
        rows = normal(1, 2 * k) + 1e-2 * rows
    return rows


def jacobians(kinds: tuple[str, ...] = KINDS, number: int = NUMBER) -> Iterator[Tensor]:
    """Draw gradients of all kinds, K = 2 to 20, in units from 1e-15 to 1e15."""
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        unit = 10.0 ** (30 * torch.rand((), generator=generator, dtype=torch.float64) - 15)
        yield jacobian(kinds[i % len(kinds)], (2, 3, 5, 5, 8, 20)[i // len(kinds) % 6], generator) * unit


@pytest.fixture(name="jacobians")
def _jacobians():
    return jacobians
