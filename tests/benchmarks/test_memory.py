from __future__ import annotations

import operator
import os
from functools import partial

import pytest
import torch

from benchmarks import memory

MIB = 2**20


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PRELOADED", ())


def test_the_process_is_another() -> None:
    assert memory.in_fresh_process(os.getpid) != os.getpid()


def test_errors_come_back() -> None:
    with pytest.raises(ZeroDivisionError):
        memory.in_fresh_process(operator.truediv, 1, 0)


def test_peak_is_what_the_work_held_at_once() -> None:
    # Each call fills 64 MiB and drops them; what the process held before does not count. Linux keeps the resident
    # set in counters per core, which are off by some pages.
    work = partial(operator.mul, b"x", 64 * MIB)
    found = memory.in_fresh_process(memory.peak, work, torch.device("cpu"), steps=3)
    assert 63 * MIB <= found <= 72 * MIB


def test_memory_kept_from_step_to_step_counts() -> None:
    # In a process whose heap has no room that tests before it have left.
    kept: list[bytes] = []
    work = partial(_keep, kept, 16 * MIB)
    found = memory.in_fresh_process(memory.peak, work, torch.device("cpu"), steps=3)
    assert 47 * MIB <= found <= 56 * MIB


def _keep(kept: list[bytes], size: int) -> None:
    kept.append(b"x" * size)


def test_peak_on_a_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("expected a CUDA device")
    held = torch.ones(2**20, device=device)
    assert memory.peak(lambda: torch.ones_like(held), device) == held.nbytes
