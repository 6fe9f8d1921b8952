"""Losses of any scale, and clusters whose losses are not finite."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import diffmtl_fast as dm
from diffmtl_fast.weighting import METHODS

K, B = 3, 12
GRAMIAN = [name for name, method in METHODS.items() if issubclass(method.cls, dm.GramianWeighting)]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def step(name, device, factor=1.0, scaler=None, clusters=(0, 1, 2), **options):
    """One step of a method; the wrapper and all of .grad in float64."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = Denoiser().to(device)
    mtl = dm.ClusteredMTL(model, K, METHODS[name].build(K, device, seed=0), **options)
    x, y = torch.randn(2, B, 8, generator=generator).to(device)
    cluster = torch.arange(B, device=device) // (B // K)
    kept = torch.isin(cluster, torch.tensor(clusters, device=device))
    factor = torch.as_tensor(factor, device=device).expand(B)[kept]
    loss = dm.ops.sample_mse(mtl(x[kept], cluster=cluster[kept]), y[kept]) * factor
    mtl.backward(loss, scaler=scaler)
    return mtl, torch.cat([p.grad.double().flatten() for p in model.parameters()])


def assert_near(found, expected, tolerance=1e-6):
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"engine": "sliced"}], ids=str)
@pytest.mark.parametrize("name", GRAMIAN)
def test_the_update_is_as_exact_at_any_scale_of_the_losses(name, options, device):
    usual, expected = step(name, device, **options)
    for factor in (1e-30, 1e-23, 1e19, 1e22, 1e30):
        mtl, found = step(name, device, factor, **options)
        assert_near(found / factor, expected)
        torch.testing.assert_close(mtl.last.gramian / factor**2, usual.last.gramian, rtol=1e-5, atol=0)
        if mtl.last.grad_norm is not None:
            torch.testing.assert_close(mtl.last.grad_norm.double(), found.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", GRAMIAN)
def test_a_scaler_that_has_grown_for_long_changes_nothing(name, device):
    usual, expected = step(name, device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**60)
    mtl, found = step(name, device, scaler=scaler)
    assert_near(found / 2.0**60, expected, 1e-7)
    assert torch.equal(mtl.last.weights, usual.last.weights)
    for key, value in usual.weighting.state_dict().items():  # the step counts: the scaler will not skip it
        torch.testing.assert_close(mtl.weighting.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["pcgrad", "nash", "upgrad"])
def test_losses_that_are_far_apart_all_count(name, device):
    factor = torch.tensor([1e-12, 1.0, 1e12]).repeat_interleave(B // K).to(device)
    mtl, found = step(name, device, factor)
    assert found.isfinite().all()
    assert mtl.last.weights.isfinite().all()
    assert (mtl.last.weights > 0).all()


def losses_with(value, device):
    """Factors of the losses that make those of cluster 1 this."""
    return torch.where(torch.arange(B, device=device) // (B // K) == 1, value, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", list(METHODS))
def test_a_loss_that_is_not_finite_shows_in_every_gradient(name, value, device):
    _, found = step(name, device, losses_with(value, device))
    assert found.isnan().any()
    assert not found.isfinite().any()


@pytest.mark.parametrize("options", [{}, {"engine": "sliced"}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", list(METHODS))
def test_such_a_cluster_can_be_dropped_from_the_step(name, value, options, device):
    """What is left is the step of a batch without that cluster."""
    mtl, found = step(name, device, losses_with(value, device), drop_nonfinite=True, **options)
    without, expected = step(name, device, clusters=(0, 2), drop_nonfinite=True, **options)
    assert_near(found, expected)
    assert mtl.last.dropped.tolist() == [False, True, False]
    assert mtl.last.present.tolist() == [True, False, True]
    torch.testing.assert_close(mtl.last.weights, without.last.weights)
    assert mtl.last.losses[1] == 0


def test_a_step_in_which_all_clusters_are_dropped_is_none(device):
    mtl, found = step("pcgrad", device, float("nan"), drop_nonfinite=True)
    assert (found == 0).all()
    assert mtl.last.dropped.all()


def test_dropping_needs_the_rows_of_a_jacobian(device):
    with pytest.raises(ValueError, match="drop_nonfinite: expected memory='full'"):
        step("pcgrad", device, drop_nonfinite=True, memory="lean")


MEASURED = {
    "grouped": {},
    "sliced": {"engine": "sliced"},
    "lean": {"memory": "lean"},
    "bfloat16": {"jacobian_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("how", [*MEASURED, "autocast", "unsorted", "scaled"])
@pytest.mark.parametrize("name", ["uw", "famo", "dwa", "rlw", "nash"])
def test_measuring_changes_no_bit_of_an_update_and_no_random_number(name, how, device):
    def train(measure):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.LayerNorm(16), nn.Linear(16, 8)).to(
            device
        )
        weighting = METHODS[name].build(K, device, seed=0)
        if name == "nash":
            weighting.update_every = 4
        mtl = dm.ClusteredMTL(model, K, weighting, **MEASURED.get(how, {}))
        optimizer = torch.optim.SGD(dm.param_groups(model, weighting, lr=0.1, weight_decay=0.0))
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0) if how == "scaled" else None
        cluster = torch.arange(B, device=device) // (B // K)
        for i in range(6):
            mtl.measure_gramian = measure and i % 2 == 1
            x, y = torch.randn(2, B, 8, device=device)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=how == "autocast"):
                output = mtl(x, cluster=cluster.flip(0) if how == "unsorted" else cluster)
            mtl.backward(dm.ops.sample_mse(output, y), scaler=scaler)
            assert mtl.last.gramian is not None or not mtl.measure_gramian
            optimizer.step() if scaler is None else (scaler.step(optimizer), scaler.update())
        state = [*model.parameters(), *weighting.state_dict().values(), torch.randn(4, device=device)]
        return [each.detach().clone() for each in state if isinstance(each, torch.Tensor)]

    for plain, measured in zip(train(False), train(True), strict=True):
        torch.testing.assert_close(measured, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ["sorted", "unsorted"])
def test_a_measured_gramian_is_that_of_the_masks_that_were_drawn(order, device):
    """Of the plain forward's own dropout: it is repeated with its random numbers, or differentiated by cluster."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8)).to(device).double()
    x, y = torch.randn(2, B, 8, device=device, dtype=torch.float64)
    cluster = torch.arange(B, device=device) // (B // K)
    if order == "unsorted":
        cluster = cluster.flip(0)
    mtl = dm.ClusteredMTL(model, K, dm.Equal())
    mtl.measure_gramian = True
    torch.manual_seed(1)
    mtl.backward(dm.ops.sample_mse(mtl(x, cluster=cluster), y))
    torch.manual_seed(1)
    losses = dm.ops.cluster_mean(dm.ops.sample_mse(model(x), y), cluster, K)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert_near(mtl.last.gramian, jacobian @ jacobian.T)


def test_threads_that_share_a_wrapper_are_refused(device):
    torch.manual_seed(0)
    mtl = dm.ClusteredMTL(Denoiser().to(device), K, dm.PCGrad())
    x, cluster = torch.randn(B, 8, device=device), torch.arange(B, device=device) // (B // K)
    loss = dm.ops.sample_mse(mtl(x, cluster=cluster), x)
    refused = []

    def other():
        try:
            mtl(x, cluster=cluster)
        except RuntimeError as error:
            refused.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "expected the steps of one thread" in refused[0]
    mtl.backward(loss)  # the thread whose step it is goes on
    copy.deepcopy(mtl)(x, cluster=cluster)


@pytest.mark.parametrize("call", ["forward", "backward"])
def test_threads_that_call_a_wrapper_at_once_are_refused(device, call):
    class Waits(Denoiser):
        began, go = threading.Event(), threading.Event()

        def forward(self, x):
            self.began.set()
            assert self.go.wait(30)
            return super().forward(x)

    mtl = dm.ClusteredMTL(Waits().to(device), K, dm.Equal())
    x, cluster = torch.randn(B, 8, device=device), torch.arange(B, device=device) // (B // K)
    done = []
    thread = threading.Thread(target=lambda: done.append(mtl(x, cluster=cluster)))
    thread.start()
    assert mtl.module.began.wait(30)
    with pytest.raises(RuntimeError, match="a call while that of another thread runs"):
        mtl(x, cluster=cluster) if call == "forward" else mtl.backward(torch.ones(B))
    mtl.module.go.set()
    thread.join()
    assert done[0].shape == x.shape


def test_a_mean_over_the_inputs_is_exact_in_a_sorted_batch_and_refused_in_another(device):
    class Shifted(Denoiser):
        def forward(self, x):
            return super().forward(x) + x.mean()

    torch.manual_seed(0)
    mtl = dm.ClusteredMTL(Shifted().to(device), K, dm.PCGrad())
    x, y = torch.randn(2, B, 8, device=device)
    cluster = torch.arange(B, device=device) // (B // K)
    mtl.backward(dm.ops.sample_mse(mtl(x, cluster=cluster), y))
    losses = dm.ops.cluster_mean(dm.ops.sample_mse(mtl.module(x), y), cluster, K)
    rows = [torch.autograd.grad(loss, list(mtl.module.parameters()), retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    assert_near(mtl.last.gramian, jacobian @ jacobian.T)
    with pytest.raises(ValueError, match="sample"):
        mtl(x, cluster=cluster.flip(0))
