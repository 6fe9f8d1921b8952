"""Shared by all tests: the device they run on, and memory that is never zero by luck."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("DIFFMTL_TEST_DEVICE", "cpu")
if DEVICE == "cpu":  # before the first import of triton
    os.environ["TRITON_INTERPRET"] = "1"
_ALLOCATORS = {torch: ("empty", "empty_like", "empty_strided"), torch.Tensor: ("new_empty",)}


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.numel() else tensor

    return wrapper


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch, request):
    """Fill uninitialised memory with NaN, so that an element left unwritten fails its test."""
    if "compile" in request.keywords:  # a compiler traces the allocators themselves
        return
    for owner, names in _ALLOCATORS.items():
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def device() -> torch.device:
    """The device under test: DIFFMTL_TEST_DEVICE, by default the CPU."""
    return torch.device(DEVICE)


@pytest.fixture
def generator(device) -> torch.Generator:
    """A freshly seeded generator on the device under test."""
    return torch.Generator(device).manual_seed(0)
