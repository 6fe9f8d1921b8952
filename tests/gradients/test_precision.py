"""Low precision, gradient scaling and accumulation, against one torch.autograd.grad per cluster."""

from __future__ import annotations

import copy

import pytest
import torch
from denoiser import SORTED, UNSORTED, batch, make
from exactness import Given, K, assert_exact, assert_near, sample_losses
from torch.utils._pytree import tree_leaves

import diffmtl_fast as dm
from benchmarks.reference import cluster_gradients, nash_weights, update_direction

LOWER = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOWER, ids=str)
@pytest.mark.parametrize("cluster", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
def test_autocast(options, cluster, dtype, device):
    model, *inputs = make(device, torch.float32)
    mtl = assert_exact(
        model,
        *inputs,
        cluster=cluster,
        context=lambda: torch.autocast(device.type, dtype),
        rtol=2.5 * torch.finfo(dtype).eps,  # the reference itself rounds its weight gradients
        options=options,
    )
    assert mtl.last.gramian.dtype == torch.float64


def test_a_model_in_bfloat16(options, device):
    model, *inputs = make(device, torch.bfloat16)
    assert_exact(model, *inputs, rtol=0.03, options=options)


def test_a_jacobian_in_bfloat16(device):
    model, *inputs = make(device, torch.float32)
    mtl = assert_exact(model, *inputs, rtol=5e-3, options={"jacobian_dtype": torch.bfloat16})
    assert {block.dtype for block in mtl._engine.jacobian.blocks} == {torch.bfloat16}
    assert mtl.last.gramian.dtype == torch.float64


@pytest.mark.parametrize("dtype", LOWER, ids=str)
def test_a_scaler_does_not_change_the_weights(options, dtype, device):
    """The update, unscaled, is that of the reference's Nash weights of unscaled gradients."""
    model, *inputs = make(device, torch.float32)
    plain, cluster = copy.deepcopy(model), torch.tensor(UNSORTED, device=device)
    with torch.autocast(device.type, dtype):
        losses = sample_losses(plain(*inputs))
    scale = 1024.0
    scaled = cluster_gradients(losses * scale, cluster, list(plain.parameters()), K)
    jacobian = scaled.jacobian / scale
    weights = nash_weights(jacobian @ jacobian.T).to(device)
    mtl = dm.ClusteredMTL(model, K, dm.NashMTL(), **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast(device.type, dtype):
        found = sample_losses(mtl(*inputs, cluster=cluster))
    mtl.backward(found, scaler=scaler)
    rtol = 2.5 * torch.finfo(dtype).eps
    assert_near(mtl.last.weights, weights, rtol, "weights")
    direction = update_direction(jacobian, weights, scaled.present)
    scaler.unscale_(optimizer)
    assert_near(torch.cat([p.grad.flatten() for p in model.parameters()]), direction, 2 * rtol, "direction")
    before = [p.clone() for p in model.parameters()]
    scaler.step(optimizer)
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, old - 0.1 * p.grad)


WEIGHTINGS = {
    "Nash": lambda device: dm.NashMTL(),
    "Nash, refreshed at times": lambda device: dm.NashMTL(update_every=3),
    "uncertainty": lambda device: dm.UncertaintyWeighting(K).to(device),
    "uncertainty, measured": lambda device: dm.UncertaintyWeighting(K).to(device),
    "PCGrad": lambda device: dm.PCGrad(torch.Generator(device).manual_seed(0)),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_skipped_step_changes_nothing(name, options, device):
    model, *inputs = make(device, torch.float32)
    weighting, cluster = WEIGHTINGS[name](device), torch.tensor(UNSORTED, device=device)
    mtl = dm.ClusteredMTL(model, K, weighting, **options)
    mtl.measure_gramian = name.endswith("measured")
    optimizer = torch.optim.SGD(dm.param_groups(model, weighting, lr=0.1))
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0)

    def state():
        return copy.deepcopy([*tree_leaves(weighting.state_dict()), *model.parameters()])

    def unchanged(before):
        pairs = zip(state(), before, strict=True)
        return [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs]

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            losses = sample_losses(mtl(*inputs, cluster=cluster))
        mtl.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()

    step()  # so that there is a state to lose
    for _ in range(3):
        before = state()
        scaler.update(2.0**100)
        step()
        assert scaler.get_scale() == 2.0**99
        assert all(unchanged(before))
        scaler.update(256.0)
        step()
        same = unchanged(before)
        number = len(before) - len(list(model.parameters()))
        assert not all(same[:number])
        assert not all(same[number:])


@pytest.mark.parametrize("update_every", [1, 3])
def test_an_overflow_of_an_earlier_micro_batch_counts(update_every, options, device):
    model, *inputs = make(device, torch.float32)
    weighting, cluster = dm.NashMTL(update_every), torch.tensor(UNSORTED, device=device)
    mtl = dm.ClusteredMTL(model, K, weighting, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    for steps in (1, 1):  # the second finds the first one's .grad
        mtl.backward(sample_losses(mtl(*inputs, cluster=cluster)), scaler=scaler)
        assert weighting.steps == steps
        model.time.bias.grad[0] = torch.inf


def test_accumulation_over_micro_batches_with_a_scaler(options, device):
    model, *_ = make(device, torch.float32)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    plain, expected = copy.deepcopy(model), 0
    for seed, cluster in enumerate([SORTED, UNSORTED, [1, 1]]):
        inputs, cluster = (
            batch(device, torch.float32, len(cluster), seed),
            torch.tensor(cluster, device=device),
        )
        gradients = cluster_gradients(sample_losses(plain(*inputs)), cluster, list(plain.parameters()), K)
        mtl.backward(sample_losses(mtl(*inputs, cluster=cluster)), scaler=scaler)
        expected = expected + update_direction(gradients.jacobian, mtl.last.weights, gradients.present)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_near(found / 64, expected, 1e-5, "direction")


def test_the_norm_is_that_of_all_that_would_be_clipped(device):
    """Of what was accumulated before, too, where this step does not use it."""
    model, x, t, label = make(device)
    mtl, cluster = dm.ClusteredMTL(model, K, Given()), torch.tensor(UNSORTED, device=device)
    mtl.backward(sample_losses(mtl(x, t, label, cluster=cluster)))
    kept = model.label.weight.grad.clone()
    mtl.backward(sample_losses(mtl(x, t, cluster=cluster)))
    assert torch.equal(model.label.weight.grad, kept)
    grads = [p.grad for p in model.parameters()]
    torch.testing.assert_close(mtl.last.grad_norm, torch.nn.utils.get_total_norm(grads))
    twin = copy.deepcopy(model)
    for clipped, original in zip(twin.parameters(), model.parameters(), strict=True):
        clipped.grad = original.grad.clone()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e-2)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1e-2, mtl.last.grad_norm)
    for clipped, original in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(original.grad, clipped.grad)
