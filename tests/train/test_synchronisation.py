"""A step, once its checks are over, reads nothing that an accelerator would have to be waited for."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffmtl_fast as dm
from diffmtl_fast import _host
from diffmtl_fast.clustering import drawing, intervals
from diffmtl_fast.curriculum import timestep_sampler
from diffmtl_fast.train.config import PLAIN
from diffmtl_fast.train.history import History
from diffmtl_fast.train.loop import Trainer

PACKAGE = Path(dm.__file__).parent
OPTIMIZERS = Path(torch.optim.__file__).parent
FUNCTIONS = {
    *(torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.nonzero),
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
    *(torch.Tensor.__array__, torch.Tensor.__contains__, torch.equal, torch.allclose),
}
# Their result, or its shape, depends on values.
OPERATORS = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "histogram"),
}
#: Functions of the package that may read in a step, and why.
ON_THE_HOST = {
    "clustering/intervals.py assign": "of levels on the CPU alone, where samplers draw",
    # On the CPU alone; that no weighting reads what is elsewhere is tested by tensors without values.
    "ops/gram.py gram_at_any_scale": "sees whether squares are in range",
    "weighting/_losses.py log_losses": "refuses negative losses",
    "weighting/_nonnegative.py minimise": "leaves a finished loop",
    "weighting/cagrad.py weigh": "leaves a finished loop",
    "weighting/fairgrad.py _newton": "leaves a finished loop",
}


class _Functions(TorchFunctionMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FUNCTIONS:
            self.note(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        counted = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        if name in OPERATORS or masked or counted:
            self.note(name)
        return op(*args, **(kwargs or {}))


class Reads:
    """Counts what reads values, by the function of the package that does so."""

    def __init__(self):
        self.found = Counter()
        self._modes = _Functions(self._note), _Operators(self._note)

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self.found

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def _note(self, what):
        frame = sys._getframe()
        while frame is not None:
            path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
            if path.is_relative_to(OPTIMIZERS) or name == "drawn_counts":  # of counters and draws on the host
                return
            if path.is_relative_to(PACKAGE) and not name.startswith("<"):
                site = f"{path.relative_to(PACKAGE)} {name}"
                break
            frame = frame.f_back
        else:
            site = "outside"
        if site not in ON_THE_HOST:
            self.found[f"{site}: {what}"] += 1


@contextmanager
def no_reads(device):
    """Refuse reads: on a GPU every wait for it, elsewhere what would wait for one."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Reads() as found:
        yield
    assert not found


@pytest.fixture(autouse=True)
def _as_if_uploaded(monkeypatch):
    """Know the counts of clusters that stay on the CPU, too, as of those that go to a GPU."""

    def hand_over(level, cluster, device):
        level, there = drawing.hand_over(level, cluster, device)
        if device.type == "cpu":
            _host._counts[there] = there._version, drawn_counts(cluster)
        return level, there

    for module in (intervals, timestep_sampler):
        monkeypatch.setattr(module, "hand_over", hand_over)


def drawn_counts(cluster):
    return cluster.bincount().tolist()


READERS = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "index": lambda x: [0, 1][x[0].long()],
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "gradient": lambda x: _Reading.apply(x.clone().requires_grad_()).sum().backward(),
}


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


@pytest.mark.parametrize("name", READERS)
def test_reads_are_found(name):
    with Reads() as found:
        READERS[name](torch.tensor([1.0, 0.0]))
    assert found


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(20, 8)
        self.conv, self.norm, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 1)

    def forward(self, x, t):
        h = self.norm(self.conv(x) + self.time(t)[:, :, None, None])
        return self.last(h.relu().movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("method", dm.weighting.METHODS)
def test_the_loop_of_the_readme(method, memory, device):
    weighting = dm.weighting.METHODS[method].build(5, device, 0)
    model, clusters = Denoiser().to(device), dm.cluster_timesteps(20, 5)
    mtl = dm.ClusteredMTL(model, num_clusters=5, weighting=weighting, memory=memory)
    optimizer = torch.optim.AdamW(dm.param_groups(model, weighting, lr=1e-4, weight_decay=0.0))

    def step():
        noise = torch.randn(12, 1, 4, 4, device=device)
        t, cluster = clusters.sample(12, device=device)
        loss = dm.ops.sample_mse(mtl(noise + 1, t, cluster=cluster), noise)
        optimizer.zero_grad()
        mtl.backward(loss)
        optimizer.step()

    for _ in range(2):  # with the checks of the first steps
        step()
    with no_reads(device):
        for _ in range(2):
            step()


@pytest.mark.parametrize("method", [PLAIN, *dm.weighting.METHODS])
def test_a_step_of_the_trainer(tiny, tmp_path, method, device):
    trainer, history = Trainer(tiny(method=method)), History(tmp_path / "log.jsonl")
    for _ in range(2):
        trainer.step(history)
    with no_reads(device):
        for _ in range(2):
            trainer.step(history)
    history.close()
