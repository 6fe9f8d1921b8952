"""Compiled models and CUDA graphs, against one torch.autograd.grad per cluster of the model as written."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from exactness import WAYS, assert_exact, in_slices
from torch import nn

CLUSTER = [2, 0, 2, 1, 0, 1]  # slices of one shape: one compilation


def make(device, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Sequential(nn.SiLU(), nn.Linear(8, 4)))
    return model.to(device, dtype), torch.randn(len(CLUSTER), 4, device=device, dtype=dtype)


def _in_place(module):
    module.compile(backend="aot_eager")
    return module


def _a_submodule(model):
    model[2] = torch.compile(model[2], backend="aot_eager")
    return model


BEFORE = {
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
    "in place": _in_place,
    "a submodule": _a_submodule,
}
AFTER = {
    "compiled": lambda mtl: torch.compile(mtl, backend="aot_eager"),
    "in place": _in_place,
    "its module": lambda mtl: (_in_place(mtl.module), mtl)[1],
}


@pytest.mark.compile
@pytest.mark.parametrize("how", BEFORE)
@pytest.mark.parametrize("engine", ["auto", "grouped", "sliced"])
def test_models_compiled_before_wrapping(how, engine, device):
    (model, x), (plain, _) = make(device), make(device)
    mtl = assert_exact(BEFORE[how](model), x, cluster=CLUSTER, plain=plain, options={"engine": engine})
    assert mtl._engine._told.startswith("sliced" if engine == "sliced" else "compiled")


@pytest.mark.compile
@pytest.mark.parametrize("how", AFTER)
def test_compilation_after_wrapping(how, device):
    """The wrapper itself is never compiled, so that the grouped engine sees the operations."""
    (model, x), (plain, _) = make(device), make(device)
    mtl = assert_exact(model, x, cluster=CLUSTER, plain=plain, wrap=AFTER[how])
    assert mtl._engine._told.startswith("compiled" if how == "its module" else "grouped")


class Functions(nn.Module):
    """Functions of activations alone, and of a parameter, compiled or not."""

    def __init__(self, compile):
        super().__init__()
        self.linear, self.gain = nn.Linear(4, 4), nn.Parameter(torch.rand(4) + 0.5)
        self.gated, self.scaled = compile(lambda x: F.silu(x) * x), compile(lambda x, gain: x * gain**2)

    def forward(self, x):
        return self.scaled(self.gated(self.linear(x)), self.gain)


@pytest.mark.compile
@pytest.mark.parametrize("way", WAYS)
def test_compiled_functions_in_a_model(way, device):
    compiles = [functools.partial(torch.compile, backend="aot_eager"), lambda function: function]
    torch.manual_seed(0)
    model, plain = (Functions(compile).to(device).double() for compile in compiles)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(len(CLUSTER), 4, dtype=torch.float64, device=device)
    mtl = assert_exact(model, x, cluster=CLUSTER, plain=plain, options=WAYS[way])
    assert in_slices(mtl) == (None if way == "sliced" else [])


@pytest.mark.compile
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs():
    (model, x), (plain, _) = (
        make(torch.device("cuda"), torch.float32),
        make(torch.device("cuda"), torch.float32),
    )
    compiled = torch.compile(model, mode="reduce-overhead")
    mtl = assert_exact(compiled, x, cluster=CLUSTER, rtol=1e-5, steps=4, plain=plain)
    assert mtl._engine._told.startswith("compiled")
