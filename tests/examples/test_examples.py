"""The examples run, their losses fall, and their gradients are those of one backward per cluster."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import diffmtl_fast as dm
from diffmtl_fast.gradients import ClusterJacobian

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_exact(model, batch=10, width=16, clusters=5):
    """J of the trained model, against one torch.autograd.grad per cluster."""
    x, noise, t = torch.randn(batch, width), torch.randn(batch, width), torch.arange(batch) * 90
    cluster = torch.arange(batch) % clusters
    jacobian = ClusterJacobian(model, clusters)
    jacobian(lambda call: dm.ops.sample_mse(call(x, t), noise), cluster)
    losses = dm.ops.cluster_mean(dm.ops.sample_mse(model(x, t), noise), cluster, clusters)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(
        jacobian.matrix(), expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain_loop", ["--device", "cpu"]),
        ("accelerate_loop", ["--cpu"]),
        ("accelerate_loop", ["--cpu", "--mixed-precision", "bf16"]),
    ],
)
def test_the_loss_falls_and_gradients_are_exact(name, options):
    if name == "accelerate_loop":
        state = pytest.importorskip("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
    example = load(name)
    mtl, losses = example.train(example.parse(options))
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert_exact(mtl.module)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 120
