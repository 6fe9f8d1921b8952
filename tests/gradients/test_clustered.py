"""ClusteredMTL against one torch.autograd.grad per cluster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffmtl_fast as dm
from benchmarks.reference import cluster_gradients, update_direction

K = 4
SORTED = [0, 0, 0, 1, 2, 2, 3, 3]
UNSORTED = [3, 0, 2, 0, 1, 3, 0, 2]
ABSENT = [3, 0, 3, 0, 0, 3, 0, 1]  # no sample of cluster 2
ONE = [1] * 8
BATCHES = {"sorted": SORTED, "unsorted": UNSORTED, "absent": ABSENT, "one cluster": ONE}


class Net(nn.Module):
    """A denoiser in miniature: embedding of t, linear layers, normalisation."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.first, self.norm, self.last = nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x, t, scale=None):
        hidden = torch.tanh(self.norm(self.first(x) + self.embed(t)))
        out = self.last(hidden)
        return out if scale is None else out * scale


def make_batch(cluster, device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    size = len(cluster)
    x, target = (torch.randn(size, 3, generator=generator, dtype=dtype).to(device) for _ in range(2))
    t = torch.randint(10, (size,), generator=generator).to(device)
    return x, t, target, torch.tensor(cluster, device=device)


def make_net(device, dtype=torch.float64, cls=Net):
    torch.manual_seed(0)
    return cls().to(device, dtype)


def oracle(loss, cluster, parameters, k=K):
    return cluster_gradients(loss, cluster, list(parameters), k)


def flat_grad(parameters):
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.fixture(params=["grouped", "sliced"], autouse=True)
def engine(request, monkeypatch):
    """Run every test with either engine."""
    monkeypatch.setitem(dm.ClusteredMTL.__init__.__kwdefaults__, "engine", request.param)
    return request.param


def weightings():
    return {
        "equal": dm.Equal(),
        "uncertainty": dm.UncertaintyWeighting(K),
        "pcgrad": dm.PCGrad(torch.Generator().manual_seed(5)),
        "nash": dm.NashMTL(),
    }


@pytest.mark.parametrize("cluster", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", weightings())
def test_step_is_exact(name, cluster, device):
    net, (x, t, target, cluster) = make_net(device), make_batch(cluster, device)
    expected = oracle(dm.ops.sample_mse(net(x, t), target), cluster, net.parameters())
    mtl = dm.ClusteredMTL(net, K, weightings()[name]).to(device)
    mtl.measure_gramian = True
    mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))

    assert torch.equal(mtl.last.present, expected.present)
    torch.testing.assert_close(mtl.last.losses, expected.losses)
    torch.testing.assert_close(
        mtl.last.gramian, expected.jacobian @ expected.jacobian.T, rtol=1e-10, atol=1e-12
    )
    assert mtl.last.weights[~expected.present].abs().sum() == 0
    direction = update_direction(expected.jacobian, mtl.last.weights.double(), expected.present)
    torch.testing.assert_close(flat_grad(net.parameters()), direction, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["equal", "uncertainty"])
def test_measuring_the_gramian_does_not_change_the_step(name, device):
    x, t, target, cluster = make_batch(ABSENT, device)
    records = []
    for measure in (False, True):
        net, weighting = make_net(device), weightings()[name].to(device)
        mtl = dm.ClusteredMTL(net, K, weighting)
        mtl.measure_gramian = measure
        mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
        assert (mtl.last.gramian is not None) == measure
        learned = [p.grad for p in weighting.parameters()]
        records.append((flat_grad(net.parameters()), mtl.last.weights, *learned))
    for plain, measured in zip(*records, strict=True):
        assert torch.equal(measured, plain)


def test_equal_weights_are_ordinary_training_on_the_mean_of_cluster_losses(device):
    net, (x, t, target, cluster) = make_net(device), make_batch(ABSENT, device)
    losses = dm.ops.cluster_mse(net(x, t), target, cluster, K)
    (losses.sum() / 3).backward()
    expected = flat_grad(net.parameters())
    net.zero_grad()
    mtl = dm.ClusteredMTL(net, K, dm.Equal())
    mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
    torch.testing.assert_close(flat_grad(net.parameters()), expected)


def test_nash_between_refreshes_forms_no_gradients_per_cluster(device):
    net, (x, t, target, cluster) = make_net(device), make_batch(SORTED, device)
    mtl = dm.ClusteredMTL(net, K, dm.NashMTL(update_every=2))
    gramians = []
    for _ in range(4):
        net.zero_grad()
        mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
        gramians.append(mtl.last.gramian)
        expected = oracle(dm.ops.sample_mse(net(x, t), target), cluster, net.parameters())
        direction = update_direction(expected.jacobian, mtl.last.weights, expected.present)
        torch.testing.assert_close(flat_grad(net.parameters()), direction, rtol=1e-7, atol=1e-12)
    assert [g is None for g in gramians] == [False, True, False, True]


def test_grad_accumulates_over_calls_and_onto_what_was_there(device):
    net, weighting = make_net(device), dm.NashMTL()
    mtl = dm.ClusteredMTL(net, K, weighting)
    directions = []
    for micro in (SORTED, ABSENT):
        x, t, target, cluster = make_batch(micro, device)
        net.zero_grad()
        mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
        directions.append(flat_grad(net.parameters()))
    for p in net.parameters():
        p.grad = torch.full_like(p, 3.0)
    for micro in (SORTED, ABSENT):
        x, t, target, cluster = make_batch(micro, device)
        mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
    torch.testing.assert_close(flat_grad(net.parameters()), 3.0 + directions[0] + directions[1])


def test_a_scaled_loss_scales_the_direction(device):
    net, (x, t, target, cluster) = make_net(device), make_batch(SORTED, device)
    found = []
    for scale in (1.0, 65536.0):
        mtl = dm.ClusteredMTL(net, K, dm.NashMTL())
        net.zero_grad()
        mtl.backward(scale * dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
        found.append(flat_grad(net.parameters()) / scale)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0)


def test_tied_weights_and_reused_modules(device):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
            self.last.weight = self.first.weight

        def forward(self, x, t):
            return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))

    net, (x, t, target, cluster) = make_net(device, cls=Tied), make_batch(UNSORTED, device)
    expected = oracle(dm.ops.sample_mse(net(x, t), target), cluster, net.parameters())
    mtl = dm.ClusteredMTL(net, K, dm.NashMTL())
    mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
    direction = update_direction(expected.jacobian, mtl.last.weights, expected.present)
    torch.testing.assert_close(flat_grad(net.parameters()), direction)


def test_parameters_of_several_dtypes_and_layouts(device):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).to(
        device, torch.float64
    )
    net[0].to(memory_format=torch.channels_last)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.shift = net, nn.Parameter(torch.zeros(3, 1, 1, device=device))  # float32

        def forward(self, x):
            return self.net(x) + self.shift

    model, (_, _, _, cluster) = Mixed(), make_batch(UNSORTED, device)
    x, target = (torch.randn(8, 3, 5, 5, dtype=torch.float64, device=device) for _ in range(2))
    expected = oracle(dm.ops.sample_mse(model(x), target), cluster, model.parameters())
    mtl = dm.ClusteredMTL(model, K, dm.PCGrad())
    mtl.backward(dm.ops.sample_mse(mtl(x, cluster=cluster), target))
    torch.testing.assert_close(
        mtl.last.gramian, expected.jacobian @ expected.jacobian.T, rtol=1e-5, atol=1e-9
    )
    direction = update_direction(expected.jacobian, mtl.last.weights, expected.present)
    torch.testing.assert_close(
        flat_grad(model.parameters()), direction, rtol=1e-5, atol=1e-9, check_dtype=False
    )
    assert [p.grad.stride() for p in model.parameters()] == [p.stride() for p in model.parameters()]
    assert model.shift.grad.dtype == torch.float32


def test_nested_outputs_and_arguments(device):
    class Nested(Net):
        def forward(self, x, t, extra=None, table=None):
            out = super().forward(x, t, scale=extra["scale"][0])
            return {"sample": out + table.mean(0), "size": out.sum(1), "pair": (t, None), "tag": "v"}

    net, (x, t, _, cluster) = make_net(device, cls=Nested), make_batch(UNSORTED, device)
    extra = {"scale": [torch.rand(8, 1, dtype=torch.float64, device=device)]}
    table = torch.rand(8, 3, dtype=torch.float64, device=device)  # 8 rows like the batch, but not samples
    mtl = dm.ClusteredMTL(net, K, dm.PCGrad(), shared=["table"])
    found = mtl(x, t, extra=extra, table=table, cluster=cluster)
    expected = net(x, t, extra=extra, table=table)
    torch.testing.assert_close(found["sample"], expected["sample"])
    torch.testing.assert_close(found["size"], expected["size"])  # [B]
    assert torch.equal(found["pair"][0], t)
    assert found["pair"][1] is None
    assert found["tag"] == "v"


def test_gradients_reach_inputs_and_outside_parameters(device):
    net, (x, t, target, cluster) = make_net(device), make_batch(UNSORTED, device)
    outside = nn.Linear(3, 3).to(device, torch.float64)
    mtl = dm.ClusteredMTL(net, K, dm.PCGrad())
    mtl.backward(dm.ops.sample_mse(mtl(outside(x), t, cluster=cluster), target))
    found = outside.weight.grad
    losses = dm.ops.cluster_mse(net(outside(x), t), target, cluster, K)
    (expected,) = torch.autograd.grad(losses.mean(), outside.weight)
    torch.testing.assert_close(found, expected)


def test_without_cluster_or_gradients_it_is_the_model(device):
    net, (x, t, _, cluster) = make_net(device), make_batch(UNSORTED, device)
    mtl = dm.ClusteredMTL(net, K, dm.PCGrad())
    assert torch.equal(mtl(x, t), net(x, t))
    with torch.no_grad():
        assert torch.equal(mtl(x, t, cluster=cluster), net(x, t))
    with pytest.raises(RuntimeError, match="expected a forward with cluster"):
        mtl.backward(torch.zeros(8, device=device, requires_grad=True))


def test_the_state_is_the_models_own(device):
    net = make_net(device)
    mtl = dm.ClusteredMTL(net, K, dm.UncertaintyWeighting(K))
    assert list(mtl.state_dict()) == list(net.state_dict())
    mtl.load_state_dict({name: torch.zeros_like(p) for name, p in net.state_dict().items()})
    assert all((p == 0).all() for p in net.parameters())


def test_a_copy_is_independent(device):
    net, (x, t, target, cluster) = make_net(device), make_batch(UNSORTED, device)
    mtl = dm.ClusteredMTL(net, K, dm.PCGrad())
    mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
    expected = flat_grad(net.parameters())
    net.zero_grad()
    twin = copy.deepcopy(mtl)
    twin.backward(dm.ops.sample_mse(twin(x, t, cluster=cluster), target))
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(flat_grad(twin.module.parameters()), expected)


def test_it_follows_the_optimizer_and_moved_parameters(device):
    net, (x, t, target, cluster) = make_net(device), make_batch(UNSORTED, device)
    mtl, optimizer = dm.ClusteredMTL(net, K, dm.PCGrad()), torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        if step == 2:
            for p in net.parameters():
                p.data = p.data.clone()  # new memory, as .to() gives
        optimizer.zero_grad()
        expected = oracle(dm.ops.sample_mse(net(x, t), target), cluster, net.parameters())
        mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
        torch.testing.assert_close(mtl.last.gramian, (expected.jacobian @ expected.jacobian.T).double())
        optimizer.step()


@pytest.mark.parametrize("name", ["equal", "nash"])
def test_a_forward_that_fails_leaves_no_step_to_finish(name, device):
    net, (x, t, target, cluster) = make_net(device), make_batch(UNSORTED, device)
    mtl = dm.ClusteredMTL(net, K, weightings()[name])
    with pytest.raises(RuntimeError):
        mtl(x[:, :2], t, cluster=cluster)
    with pytest.raises(RuntimeError, match="expected a forward with cluster"):
        mtl.backward(dm.ops.sample_mse(net(x, t), target))
    net.first.requires_grad_(False)  # seen, as by any first forward of a step
    mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
    assert net.first.weight.grad is None


def test_same_inputs_same_bits(device):
    x, t, target, cluster = make_batch(UNSORTED, device, torch.float32)
    found = []
    for _ in range(2):
        net = make_net(device, torch.float32)
        mtl = dm.ClusteredMTL(net, K, dm.PCGrad(torch.Generator().manual_seed(0)))
        mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
        found.append(flat_grad(net.parameters()))
    assert torch.equal(*found)


def test_lost_gradients_are_noticed(device):
    net, (x, t, target, cluster) = make_net(device), make_batch(UNSORTED, device)
    mtl = dm.ClusteredMTL(net, K, dm.PCGrad())
    dm.ops.sample_mse(mtl(x, t, cluster=cluster), target).mean().backward()
    with pytest.raises(
        RuntimeError, match=r"found gradients written by another backward \(loss.backward\(\)"
    ):
        mtl(x, t, cluster=cluster)
    mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))  # and the next step works
    assert net.first.weight.grad is not None


@pytest.mark.parametrize("name", ["equal", "uncertainty"])
def test_a_plain_backward_is_noticed_where_the_step_is_plain(name, device):
    net, (x, t, target, cluster) = make_net(device), make_batch(UNSORTED, device)
    mtl = dm.ClusteredMTL(net, K, weightings()[name].to(device))
    mtl(x, t, cluster=cluster)  # a forward that nobody differentiates is nothing to complain about
    net.zero_grad()
    dm.ops.sample_mse(mtl(x, t, cluster=cluster), target).mean().backward()
    with pytest.raises(RuntimeError, match=r"\(loss.backward\(\)\?\); they were not weighted"):
        mtl(x, t, cluster=cluster)
    for _ in range(2):  # accumulation is no misuse
        mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))


def test_batch_normalisation_is_refused_by_name(device):
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3)), nn.Linear(3, 3)).to(device)
    x, _, target, cluster = make_batch(SORTED, device, torch.float32)
    mtl = dm.ClusteredMTL(net, K, dm.PCGrad())
    with pytest.raises(ValueError, match=r"BatchNorm1d in training mode at '1.0'"):
        mtl(x, cluster=cluster)
    mtl.eval()
    mtl.backward(dm.ops.sample_mse(mtl(x, cluster=cluster), target))
    plain = dm.ClusteredMTL(net.train(), K, dm.Equal())  # a losses-only weighting runs the plain step
    plain.backward(dm.ops.sample_mse(plain(x, cluster=cluster), target))


def test_outputs_that_are_no_batch_are_refused(device):
    class Scalar(Net):
        def forward(self, x, t):
            return super().forward(x, t).mean()

    net, (x, t, _, cluster) = make_net(device, cls=Scalar), make_batch(SORTED, device)
    with pytest.raises(ValueError, match=r"one row per sample \(\[.*\), found \[\]"):
        dm.ClusteredMTL(net, K, dm.PCGrad())(x, t, cluster=cluster)


@pytest.mark.parametrize(
    ("cluster", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "int64 tensor"),
        ([0, 4], ValueError, r"indices in 0..3, found 0..4"),
        ([[0, 1]], ValueError, r"shape \[B\] with B >= 1, found \[1, 2\]"),
    ],
)
def test_bad_clusters_are_refused(cluster, error, message):
    mtl = dm.ClusteredMTL(make_net("cpu"), K, dm.PCGrad())
    with pytest.raises(error, match=message):
        mtl(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1]), cluster=torch.tensor(cluster))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda loss: loss.mean(), ValueError, r"shape \[8\] .* found \[\]"),
        (lambda loss: loss.detach(), ValueError, "without gradient"),
        (lambda loss: loss.detach().long(), TypeError, "found torch.int64"),
    ],
)
def test_bad_losses_are_refused(change, error, message):
    x, t, target, cluster = make_batch(SORTED, "cpu")
    mtl = dm.ClusteredMTL(make_net("cpu"), K, dm.PCGrad())
    with pytest.raises(error, match=message):
        mtl.backward(change(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dm.ClusteredMTL(nn.Linear(1, 1), 0, dm.PCGrad()), ValueError, "at least 1, found 0"),
        (lambda: dm.ClusteredMTL(nn.Linear(1, 1), 2, nn.Identity()), TypeError, "found Identity"),
        (
            lambda: dm.ClusteredMTL(nn.DataParallel(nn.Linear(1, 1)), 2, dm.PCGrad()),
            TypeError,
            "expected the bare model, found DataParallel",
        ),
        (
            lambda: dm.ClusteredMTL(nn.Identity(), 2, dm.PCGrad())(torch.zeros(1), cluster=torch.tensor([0])),
            ValueError,
            "at least one parameter that requires a gradient",
        ),
    ],
)
def test_bad_set_ups_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_jacobian_is_one_buffer_for_all_steps(device):
    net, (x, t, target, cluster) = make_net(device), make_batch(SORTED, device)
    mtl = dm.ClusteredMTL(net, K, dm.PCGrad())
    seen = set()
    for _ in range(3):
        mtl.backward(dm.ops.sample_mse(mtl(x, t, cluster=cluster), target))
        seen.add(mtl._engine.jacobian.blocks[0].data_ptr())
    assert len(seen) == 1


def test_lean_memory_with_channels_last_group_norms(engine, device):
    """PyTorch's CPU kernel crashes when asked for the parameters' gradients alone."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1)).to(device, torch.float64)
    x, target = torch.randn(2, 8, 3, 5, 5, dtype=torch.float64, device=device)
    x, cluster = x.to(memory_format=torch.channels_last), torch.tensor(UNSORTED, device=device)
    expected = oracle(dm.ops.sample_mse(net(x), target), cluster, net.parameters())
    if engine == "sliced":
        with pytest.raises(ValueError, match="expected engine 'auto' or 'grouped'"):
            dm.ClusteredMTL(net, K, dm.PCGrad(), memory="lean")
        return
    mtl = dm.ClusteredMTL(net, K, dm.PCGrad(), memory="lean")
    mtl.backward(dm.ops.sample_mse(mtl(x, cluster=cluster), target))
    torch.testing.assert_close(mtl.last.gramian, (expected.jacobian @ expected.jacobian.T).double())
    direction = update_direction(expected.jacobian, mtl.last.weights, expected.present)
    torch.testing.assert_close(flat_grad(net.parameters()), direction)
