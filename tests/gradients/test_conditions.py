"""Real training conditions, against one torch.autograd.grad per cluster in the same condition."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from denoiser import SORTED, UNSORTED, B, Denoiser, batch, make
from exactness import WAYS, Given, K, assert_exact, assert_near, in_slices, sample_losses
from torch import nn

import diffmtl_fast as dm
from benchmarks.reference import cluster_gradients, update_direction

# Layouts, partial training, shapes of batches.


def test_channels_last(options, device):
    model, x, t, label = make(device)
    model = model.to(memory_format=torch.channels_last)
    assert_exact(model, x.to(memory_format=torch.channels_last), t, label, options=options)
    assert model.head.weight.grad.stride() == model.head.weight.stride()


def test_frozen_parameters(options, device):
    model, *inputs = make(device)
    for module in (model.patch, model.blocks[0], model.label):
        module.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    model.position.requires_grad_(False)
    mtl = assert_exact(model, *inputs, options=options)
    assert model.patch.weight.grad is None
    model.zero_grad()
    model.head.requires_grad_(False)  # frozen later on
    mtl.backward(sample_losses(mtl(*inputs, cluster=torch.tensor(SORTED, device=device))))
    assert model.head.weight.grad is None
    assert model.time.weight.grad is not None


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank correction."""

    def __init__(self, base, merged):
        super().__init__()
        self.base, self.merged = base.requires_grad_(False), merged
        self.down = nn.Parameter(0.1 * torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        if self.merged:
            return F.linear(x, self.base.weight + 2.0 * self.up @ self.down, self.base.bias)
        return self.base(x) + 2.0 * F.linear(F.linear(x, self.down), self.up)


@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_low_rank_training(merged, options, device):
    model, *inputs = make(torch.device("cpu"))
    model.requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.proj = LowRank(block.qkv, merged), LowRank(block.proj, merged)
    mtl = assert_exact(model.to(device), *(i.to(device) for i in inputs), options=options)
    assert in_slices(mtl) in ([], None)
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 8
    assert all(name.endswith(("up", "down")) for name in trained)


def test_parameters_unused_in_a_step(options, device):
    model, x, t, label = make(device)
    cluster = torch.tensor(UNSORTED, device=device)
    mtl = assert_exact(model, x, t, options=options)  # without labels
    assert model.label.weight.grad is None
    mtl.backward(sample_losses(mtl(x, t, label, cluster=cluster)))
    assert model.label.weight.grad is not None


def test_a_use_without_gradient(options, device):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return torch.tanh(self.linear(x)) + self.linear(x).detach() + (self.linear(x) * 0)[..., :0].sum()

    torch.manual_seed(0)
    model, x = Twice().to(device).double(), torch.randn(B, 3, dtype=torch.float64, device=device)
    assert_exact(model, x, options=options)


@pytest.mark.parametrize("cluster", [[1], [0], [2, 1, 0], [0, 1, 2], [1, 1, 1, 1]], ids=str)
def test_small_batches(cluster, options, device):
    model, *_ = make(device)
    assert_exact(model, *batch(device, size=len(cluster)), cluster=cluster, options=options)


def test_the_batch_may_change_from_step_to_step(options, device):
    model, *_ = make(device)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    for step, cluster in enumerate([[1], SORTED, [2, 1], UNSORTED, [0, 0, 0], [1]]):
        inputs, cluster = batch(device, size=len(cluster), seed=step), torch.tensor(cluster, device=device)
        expected = cluster_gradients(sample_losses(model(*inputs)), cluster, list(model.parameters()), K)
        mtl.backward(sample_losses(mtl(*inputs, cluster=cluster)))
        assert_near(mtl.last.gramian, expected.jacobian @ expected.jacobian.T, 1e-9, "Gramian")


# Arguments and outputs.


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    extras: dict


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize("structure", ["dict", "dataclass", "named tuple", "list"])
def test_arguments_and_outputs_of_any_structure(structure, options, device):
    class Structured(Denoiser):
        def forward(self, x, conditions, *, scale=None, flag="v"):
            sample = super().forward(x, conditions["t"], conditions["more"][0]) * scale
            assert flag == "eps"
            return {
                "dict": {"sample": sample, "t": conditions["t"], "none": None, "flag": flag},
                "dataclass": Output(sample, {"double": 2 * sample}),
                "named tuple": Pair(sample, Pair(sample.square(), 3)),
                "list": [sample, [sample + 1]],
            }[structure]

    def loss_of(out):
        tensors = {
            "dict": lambda: [out["sample"]],
            "dataclass": lambda: [out.sample, out.extras["double"]],
            "named tuple": lambda: [out.first, out.second.first],
            "list": lambda: [out[0], out[1][0]],
        }[structure]()
        return sum(sample_losses(t) for t in tensors)

    model, x, t, label = make(device, cls=Structured)
    scale = torch.rand(B, 1, 1, 1, dtype=x.dtype, device=device)
    conditions = {"t": t, "more": [label]}
    assert_exact(
        model, x, conditions, scale=scale, flag="eps", cluster=UNSORTED, loss_of=loss_of, options=options
    )


def test_losses_with_several_terms(options, device):
    """A simple loss and a variational bound of a learned variance, whose mean is detached from the model."""

    def loss_of(out):
        mean, log_variance = out.chunk(2, 1)
        bound = 0.5 * (log_variance + (mean.detach() - 0.3).square() * torch.exp(-log_variance))
        return sample_losses(mean) + 1e-3 * bound.flatten(1).mean(1)

    model, *inputs = make(device)
    assert_exact(model, *inputs, loss_of=loss_of, options=options)


@pytest.mark.parametrize("dtype", [torch.float64, None], ids=["float64", "autocast"])
def test_several_forwards_share_a_backward(dtype, options, device):
    """Self-conditioning, with a gradient through the first forward, and another time step."""
    model, x, t, label = make(device, dtype or torch.float32)
    cluster, plain = torch.tensor(UNSORTED, device=device), copy.deepcopy(model)

    def losses_of(call):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is None):
            first = call(x, t, label)
            second = call(x + 0.5 * first, t // 2)
            return sample_losses(second) + 0.1 * sample_losses(first)

    expected = cluster_gradients(losses_of(plain), cluster, list(plain.parameters()), K)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    for _ in range(2):
        model.zero_grad()
        mtl.backward(losses_of(lambda *args: mtl(*args, cluster=cluster)))
        rtol = 1e-9 if dtype else 0.02
        assert_near(mtl.last.gramian, expected.jacobian @ expected.jacobian.T, rtol, "Gramian")
        direction = update_direction(expected.jacobian, mtl.last.weights, expected.present)
        assert_near(torch.cat([p.grad.flatten() for p in model.parameters()]), direction, rtol, "direction")


# Random numbers.


class LabelDropout(Denoiser):
    """Drops labels at random in training, for classifier-free guidance."""

    def forward(self, x, t, label):
        kept = torch.rand(label.shape[0], device=label.device) < 0.5
        return super().forward(x, t, torch.where(kept, label, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_dropout_draws_what_the_plain_model_draws(dtype, device):
    model, *inputs = make(device, torch.float32, cls=LabelDropout, dropout=0.3)
    plain, mtl = copy.deepcopy(model), dm.ClusteredMTL(model, K, Given(), engine="grouped")
    for seed in range(3):
        found = []
        for call in (plain, lambda *args: mtl(*args, cluster=torch.tensor(SORTED, device=device))):
            torch.manual_seed(seed)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                found.append(call(*inputs).detach())
            found.append(torch.get_rng_state())
        assert torch.equal(found[1], found[3])
        if dtype == torch.bfloat16:
            torch.testing.assert_close(found[0], found[2], rtol=0.02, atol=0.02)
        else:
            torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-6)


def test_dropout_is_exact(device):
    model, *inputs = make(device, cls=LabelDropout, dropout=0.3)
    for options in (WAYS["grouped"], WAYS["lean"]):
        assert_exact(model, *inputs, cluster=SORTED, steps=3, options=options)


# Being a module.


def test_copies_and_pickles(options, device):
    model, *inputs = make(device)
    cluster = torch.tensor(UNSORTED, device=device)
    mtl = dm.ClusteredMTL(model, K, dm.NashMTL(), **options)
    mtl.backward(sample_losses(mtl(*inputs, cluster=cluster)))
    mtl(*inputs, cluster=cluster)  # in the middle of a step
    file = io.BytesIO()
    torch.save(mtl, file)
    file.seek(0)
    twins = [copy.deepcopy(mtl), pickle.loads(pickle.dumps(mtl)), torch.load(file, weights_only=False)]
    for twin in [mtl, *twins]:
        twin.zero_grad()
        twin.backward(sample_losses(twin(*inputs, cluster=cluster)))
    for twin in twins:
        assert twin.module is not model
        torch.testing.assert_close(twin.last.gramian, mtl.last.gramian)
        for p, own in zip(twin.module.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, own.grad, rtol=1e-10, atol=1e-12)


def test_the_state_dict_is_the_unwrapped_models(options, device):
    model, *inputs = make(device)
    before = copy.deepcopy(model.state_dict())
    mtl = dm.ClusteredMTL(model, K, dm.NashMTL(), **options)
    mtl.backward(sample_losses(mtl(*inputs, cluster=torch.tensor(UNSORTED, device=device))))
    state = mtl.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    fresh = Denoiser().to(device, torch.float64)
    fresh.load_state_dict(state)
    assert [name for name, _ in mtl.module.named_parameters()] == [
        name for name, _ in fresh.named_parameters()
    ]


def test_gradients_of_inputs_are_the_unwrapped_models(options, device):
    model, x, t, label = make(device)
    plain, cluster = copy.deepcopy(model), torch.tensor(UNSORTED, device=device)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    x.requires_grad_()
    slopes = []
    for call in (plain, lambda *args: mtl(*args, cluster=cluster)):
        out = call(x, t, label)
        slopes.append(torch.autograd.grad(sample_losses(out).sum(), x, retain_graph=True)[0])
    assert_near(slopes[1], slopes[0], 1e-9, "slope")
    assert all(p.grad is None for p in model.parameters())
    mtl.backward(sample_losses(out))
    sizes = torch.bincount(cluster, minlength=K)[cluster].view(-1, 1, 1, 1)
    assert_near(x.grad, slopes[0] / sizes / K, 1e-9, "slope")  # that of the mean of the cluster losses


def test_a_plain_backward_is_the_unwrapped_models(options, device):
    model, *inputs = make(device)
    plain = copy.deepcopy(model)
    sample_losses(plain(*inputs)).mean().backward()
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    sample_losses(mtl(*inputs, cluster=torch.tensor(UNSORTED, device=device))).mean().backward()
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)


class Slope(nn.Module):
    """A model that differentiates within its forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((inner**3).exp().sum(), inner)
        return self.layer(x + slope)


def test_a_derivative_within_the_forward(device):
    mtl = assert_exact(Slope().to(device), 0.1 * torch.randn(6, 5, device=device), rtol=1e-5)
    assert in_slices(mtl) == []
