"""The examples run, their losses fall, and their gradients are those of one backward per cluster."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import diffmtl_fast as dm
from diffmtl_fast import diffusion
from diffmtl_fast.gradients import ClusterJacobian

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reset_accelerate():
    pytest.importorskip("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)


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
        ("accelerate_loop", ["--cpu", "--mixed-precision", "bf16", "--steps", "150"]),
    ],
)
def test_the_loss_falls_and_gradients_are_exact(name, options):
    if name == "accelerate_loop":
        reset_accelerate()
    example = load(name)
    mtl, losses = example.train(example.parse(options))
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    if name == "accelerate_loop":  # without autocast
        accelerate_utils = pytest.importorskip("accelerate.utils")
        accelerate_utils.extract_model_from_parallel(mtl.module, keep_fp32_wrapper=False)
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


@pytest.mark.parametrize("manual", [[], ["--manual"]])
def test_losses_of_the_lightning_module_fall_and_their_gradients_are_exact(manual):
    pytest.importorskip("lightning")
    example = load("lightning_module")
    mtl, losses = example.train(example.parse(["--accelerator", "cpu", "--steps", "60", *manual]))
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
    slow = os.environ.get("DIFFMTL_TEST_DEVICE") == "interpreter"
    args = example.parse(["--device", "cpu", *(["--steps", "2", "--batch", "8"] if slow else [])])
    model, losses = example.train(args)
    assert slow or falls(losses)
    x0, seed, t = example.draw(args)
    total = torch.cumprod(1 - torch.linspace(1e-4, 0.02, args.timesteps), 0)[t, None]
    alpha, sigma, noise = total.sqrt(), (1 - total).sqrt(), dm.ops.philox_normal(seed, x0)
    squares = (model(alpha * x0 + sigma * noise, t) - (alpha * noise - sigma * x0)) ** 2
    weight = (total / (1 - total)).clamp(max=5) / (total / (1 - total) + 1)
    expected = torch.autograd.grad((weight * squares).mean(), list(model.parameters()))
    found = torch.autograd.grad(example.sample_losses(model, x0, seed, t).mean(), list(model.parameters()))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def small_batch(shape):
    """Data, noise and timesteps, one sample of clusters 0, 1 and 3, two of 2 and 4."""
    return torch.randn(8, *shape), torch.randn(8, *shape), torch.tensor([0, 0, 150, 400, 500, 700, 900, 999])


CLUSTER = torch.tensor([0, 0, 1, 2, 2, 3, 4, 4])


def test_losses_of_diffusers_unconditional_fall_and_their_gradients_are_exact(tmp_path):
    reset_accelerate()
    example = load("diffusers_unconditional")
    mtl, losses = example.train(example.parse(["--cpu", "--steps", "30", "--output", str(tmp_path)]))
    assert falls(losses)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    averaged = list(pipeline.unet.parameters())
    assert all(
        torch.equal(p.cpu(), q) for p, q in zip(mtl.module.parameters(), averaged, strict=True)
    )  # EMA's
    batch = (pipeline.scheduler, *small_batch((3, 8, 8)))
    assert_cluster_gradients(mtl.module, example.sample_losses, batch, CLUSTER, 5)


def test_losses_of_diffusers_text_to_image_fall_and_their_gradients_are_exact(tmp_path):
    reset_accelerate()
    example = load("diffusers_text_to_image")
    args = example.parse(["--cpu", "--steps", "30", "--output", str(tmp_path)])
    mtl, losses = example.train(args)
    assert falls(losses)
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    weights = diffusion.scheduler_weights(scheduler, "min_snr", gamma=5.0)
    snr = diffusers.training_utils.compute_snr(scheduler, torch.arange(1000))  # what the script does
    torch.testing.assert_close(weights, snr.clamp(max=5.0) / snr, rtol=1e-4, atol=1e-6)
    batch = (scheduler, weights, (*small_batch((4, 8, 8)), torch.randn(8, 8, 16)))
    assert_cluster_gradients(mtl.module, example.sample_losses, batch, CLUSTER, 5)


PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import accelerate_loop as example
mtl, losses = example.train(example.parse(["--cpu", "--steps", "40", "--mixed-precision", "bf16"]))
torch.save((mtl.module.state_dict(), losses), sys.argv[2])
"""


def test_two_processes_of_the_accelerate_loop_stay_together(tmp_path):
    processes = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        variables = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROCESS, str(EXAMPLES), str(tmp_path / f"{rank}.pt")]
        processes.append(
            subprocess.Popen(command, env=variables | {name: str(value) for name, value in place.items()})
        )
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    (first, losses), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert losses != others  # data of their own
    assert falls(losses)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


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
