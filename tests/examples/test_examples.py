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


def falls(losses):
    part = len(losses) // 5
    return sum(losses[-part:]) < 0.8 * sum(losses[:part])


def assert_cluster_gradients(model, sample_losses, batch, cluster, clusters):
    """J of an example's own losses, against one torch.autograd.grad per cluster."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    jacobian = ClusterJacobian(model, clusters)
    jacobian(lambda call: sample_losses(call, *batch), cluster)
    losses = dm.ops.cluster_mean(sample_losses(model, *batch), cluster, clusters)
    rows = [torch.autograd.grad(x, parameters, retain_graph=True, materialize_grads=True) for x in losses]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(
        jacobian.matrix(), expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("dit_imagenet_latents", torch.tensor([0, 0, 100, 300, 300, 500, 700, 999])),
        ("flow_matching_sit", torch.linspace(0.05, 0.95, 8)),
    ],
)
def test_losses_of_a_script_fall_and_their_gradients_are_exact(name, times):
    example = load(name)
    args = example.parse(["--device", "cpu"])
    mtl, losses = example.train(args)
    assert falls(losses)
    cluster = torch.tensor([0, 0, 1, 2, 2, 3, 4, 4])
    mtl.module.eval()  # labels are dropped at random in training
    assert_cluster_gradients(mtl.module, example.sample_losses, example.draw(args, times), cluster, 5)


def test_losses_of_the_lightning_module_fall_and_their_gradients_are_exact():
    pytest.importorskip("lightning")
    example = load("lightning_module")
    mtl, losses = example.train(example.parse(["--accelerator", "cpu", "--steps", "60"]))
    assert falls(losses)
    batch = (torch.randn(10, 16), torch.randn(10, 16), torch.arange(10) * 90)
    assert_cluster_gradients(mtl.module, example.sample_losses, batch, torch.arange(10) % 5, 5)


def test_losses_of_edm2_fall_and_their_gradients_are_exact():
    example = load("edm2_uncertainty")
    args = example.parse(["--device", "cpu", "--batch", "10"])
    model, weighting, losses = example.train(args)
    assert falls(losses)
    assert weighting.log_var(torch.linspace(-3, 3, 5)).abs().max() > 0.1  # learned
    batch = example.draw(args)
    assert_cluster_gradients(model, example.sample_losses, batch, torch.arange(10) % 5, 5)
    x0, noise, sigma = batch
    denoised = model(x0 + sigma[:, None] * noise, sigma[:, None])
    eager = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2)[:, None] * (denoised - x0) ** 2
    torch.testing.assert_close(example.sample_losses(model, *batch), eager.mean(1))


def test_losses_of_the_fused_ops_fall_and_their_gradients_are_the_eager_ones():
    example = load("fused_ops_only")
    args = example.parse(["--device", "cpu"])
    model, losses = example.train(args)
    assert falls(losses)
    x0, seed, t = example.draw(args)
    total = torch.cumprod(1 - torch.linspace(1e-4, 0.02, args.timesteps), 0)[t, None]
    alpha, sigma, noise = total.sqrt(), (1 - total).sqrt(), dm.ops.philox_normal(seed, x0)
    squares = (model(alpha * x0 + sigma * noise, t) - (alpha * noise - sigma * x0)) ** 2
    weight = (total / (1 - total)).clamp(max=5) / (total / (1 - total) + 1)
    expected = torch.autograd.grad((weight * squares).mean(), list(model.parameters()))
    found = torch.autograd.grad(example.sample_losses(model, x0, seed, t).mean(), list(model.parameters()))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
def test_lora_adds_up_the_clusters_gradients_over_small_batches(batch, monkeypatch):
    pytest.importorskip("peft")
    example = load("lora_peft")
    args = example.parse(["--device", "cpu", "--batch", str(batch), "--accumulate", str(16 // batch)])
    model, losses = example.train(args)
    assert falls(losses)

    drawn = []
    draw = example.draw
    monkeypatch.setattr(example, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    t, cluster = torch.arange(10) * 90, torch.tensor([0, 4, 1, 1, 0, 4, 4, 2, 0, 1])  # cluster 3 is absent
    jacobian = ClusterJacobian(model, args.clusters)
    example.accumulate(args, jacobian, t, cluster)
    losses = example.sample_losses(model, *(torch.cat(part) for part in zip(*drawn, strict=True)))
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = jacobian.matrix()
    for k in range(args.clusters):
        total = losses[cluster == k].sum()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, trained, retain_graph=True)])
        torch.testing.assert_close(rows[k], expected, atol=1e-6 * float(rows.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 120
