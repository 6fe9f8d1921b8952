"""An eager model that a GPU waits for the host with is advised to be compiled, once."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn

import diffmtl_fast as dm
from diffmtl_fast.gradients import host_bound

CHANGE = 'compile={"mode": "reduce-overhead"}'


class Event:
    """Of a GPU that is as far as `done` says, one answer after the other."""

    done: list[bool] = []
    asked = 0

    def __init__(self, device):
        assert device.type == "cpu"

    def record(self):
        self.recorded = True

    def query(self):
        assert self.recorded
        Event.asked += 1
        return self.done[Event.asked - 1]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The CPU in the place of a GPU, with 3 answers asked for."""
    monkeypatch.setattr(host_bound, "pins", lambda device: True)
    monkeypatch.setattr(host_bound, "SKIPPED", 1)
    monkeypatch.setattr(host_bound, "ASKED", 3)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(Event, "asked", 0)


def advice(done, caplog, model=None, steps=6, **options):
    Event.done = done
    mtl = dm.ClusteredMTL(nn.Linear(3, 3) if model is None else model, 2, dm.PCGrad(), **options)
    with caplog.at_level(logging.INFO, "diffmtl_fast"):
        for _ in range(steps):
            x = torch.randn(4, 3)
            mtl.backward(dm.ops.sample_mse(mtl(x, cluster=torch.tensor([0, 0, 1, 1])), x))
    return sum(CHANGE in message for message in caplog.messages)


def test_a_gpu_that_waits_for_the_host_is_told_of_once(caplog):
    assert advice([True] * 3, caplog) == 1
    assert Event.asked == 3


@pytest.mark.parametrize("late", [0, 2])
def test_a_gpu_that_was_behind_once_is_not(late, caplog):
    assert advice([i != late for i in range(3)], caplog) == 0
    assert Event.asked == late + 1


def test_only_auto_advises(caplog):
    for options in ({"engine": "grouped"}, {"engine": "sliced"}, {"memory": "lean"}):
        assert advice([], caplog, **options) == 0


def test_models_that_would_run_in_slices_or_are_compiled_get_no_advice(caplog):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.GRU(3, 3, batch_first=True)

        def forward(self, x):
            return self.inner(x[:, None])[0][:, 0]

    assert advice([], caplog, Own()) == 0
    assert advice([], caplog, compile={"backend": "eager"}, steps=5) == 0


def test_the_cpu_gets_no_advice(caplog, monkeypatch):
    monkeypatch.setattr(host_bound, "pins", lambda device: False)
    assert advice([], caplog) == 0


def test_a_step_that_reads_on_the_host_is_not_asked(caplog):
    Event.done = []
    mtl = dm.ClusteredMTL(nn.Linear(3, 3), 2, dm.PCGrad())
    scaler, x = torch.amp.GradScaler("cpu"), torch.randn(4, 3)
    for _ in range(5):
        mtl.zero_grad()
        mtl.backward(dm.ops.sample_mse(mtl(x, cluster=torch.tensor([0, 0, 1, 1])), x), scaler=scaler)
    assert Event.asked == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_works_is_told_from_one_that_waits(monkeypatch):
    monkeypatch.undo()
    x = torch.randn(4096, 4096, device="cuda")
    for work in (0, 20):
        state = host_bound.HostBound()
        for _ in range(host_bound.SKIPPED + host_bound.ASKED):
            for _ in range(work):
                x @ x
            state.note_backward(x.device)
            time.sleep(0.002)
            state.note_gramian()
        assert state.found == (work == 0)
