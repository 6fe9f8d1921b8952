"""What a step makes of forwards before it, of changes in between, and of what is outside of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import WAYS, Given, K, assert_exact, assert_near, sample_losses
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

import diffmtl_fast as dm
from benchmarks.reference import cluster_gradients
from diffmtl_fast.gradients import ClusterRule, register_cluster_rule
from diffmtl_fast.gradients.rules import RULES, registry

CLUSTER = [2, 0, 2, 1, 0, 2]


def build(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(device).double()
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    return model, x, torch.tensor(CLUSTER, device=device)


def assert_step(mtl, call, cluster):
    """Take a step and compare its Gramian with that of the model as it is now."""
    losses, trained = sample_losses(call()), [p for p in mtl.module.parameters() if p.requires_grad]
    expected = cluster_gradients(losses, cluster, trained, K).jacobian
    assert_near(mtl.last.gramian, expected @ expected.T, 1e-9, "Gramian")


CHANGES = {
    "a parameter replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn_like(m[0].weight))),
    "a state assigned": lambda m: m.load_state_dict(
        {n: torch.randn_like(v) for n, v in m.state_dict().items()}, assign=True
    ),
    "frozen": lambda m: m[0].requires_grad_(False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_a_skipped_forward_begins_a_step(name, options, device):
    model, x, cluster = build(device)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))
    skipped = mtl(x, cluster=cluster)
    CHANGES[name](model)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))
    assert skipped.requires_grad
    assert_step(mtl, lambda: model(x), cluster)


def test_measuring_after_a_skipped_plain_forward(device):
    model, x, cluster = build(device)
    mtl = dm.ClusteredMTL(model, K, dm.Equal())
    mtl(x, cluster=cluster)
    mtl.measure_gramian = True
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))
    assert_step(mtl, lambda: model(x), cluster)


def test_batch_normalisation_switched_on_after_a_skipped_forward(options, device):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(device)
    x, cluster = torch.randn(6, 4, device=device), torch.tensor(CLUSTER, device=device)
    mtl = dm.ClusteredMTL(model.eval(), K, Given(), **options)
    mtl(x, cluster=cluster)
    model.train()
    with pytest.raises(ValueError, match="BatchNorm1d in training mode at '1'"):
        mtl(x, cluster=cluster)


def test_another_module_in_the_wrapper(options, device):
    model, x, cluster = build(device)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))
    mtl.module = copy.deepcopy(model)
    mtl.module[0].weight.data.mul_(2)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))
    assert_step(mtl, lambda: mtl.module(x), cluster)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_parameters_outside_get_the_gradient_of_the_mean_once(options, device):
    model, x, cluster = build(device)
    outside = nn.Linear(4, 4).to(device).double()
    mtl = dm.ClusteredMTL(Checkpointed(model), K, Given(), **options)
    mtl.backward(sample_losses(mtl(outside(x), cluster=cluster)))
    found = outside.weight.grad
    losses = dm.ops.cluster_mean(sample_losses(model(outside(x))), cluster, K)
    (expected,) = torch.autograd.grad(losses.mean(), outside.weight)
    torch.testing.assert_close(found, expected)


def test_losses_of_every_forward_are_checked(options, device):
    model, x, cluster = build(device)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    first, second = (sample_losses(mtl(given, cluster=cluster)) for given in (x, 0.5 * x))
    with pytest.raises(ValueError, match="the loss of each sample to depend on that sample's"):
        mtl.backward(first / first.mean() + second)


def test_forwards_of_one_backward_have_the_same_clusters(options, device):
    model, x, cluster = build(device)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    losses = sample_losses(mtl(x, cluster=cluster)) + sample_losses(mtl(x, cluster=cluster.flip(0)))
    with pytest.raises(ValueError, match="expected the same clusters in all forwards"):
        mtl.backward(losses)
    again = sample_losses(mtl(x, cluster=cluster)) + sample_losses(mtl(0.5 * x, cluster=cluster.clone()))
    mtl.backward(again)


# Checks leave everything as it was.


class Merging(nn.Module):
    """Merges its adapter when it is put into evaluation mode, as some LoRA layers do."""

    def __init__(self):
        super().__init__()
        self.weight, self.adapter, self.merged = (
            nn.Parameter(torch.rand(4, 4)),
            nn.Parameter(torch.rand(4, 4)),
            False,
        )

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data.add_(self.adapter.data if not mode else -self.adapter.data)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return x @ (self.weight if self.merged else self.weight + self.adapter)


class Initialising(nn.Module):
    """Takes its shift from the first batch."""

    def __init__(self):
        super().__init__()
        self.shift, self.done = nn.Parameter(torch.zeros(4)), False
        self.register_buffer("seen", None)

    def forward(self, x):
        if not self.done:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
            self.done, self.seen = True, x.detach().clone()
        return x + self.shift


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x):
        x += 1.0
        return x * self.gain


@pytest.mark.parametrize("kind", [Merging, Initialising])
@pytest.mark.parametrize("way", ["grouped", "lean"])
def test_modules_with_a_state_of_their_own(kind, way, device):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Linear(4, 2)).to(device).double()
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    assert_exact(model, x, cluster=[0, 0, 1, 2, 2, 2], options=WAYS[way])
    assert model[0].__dict__.get("done", True)
    assert not model[0].__dict__.get("merged", False)
    if kind is Initialising:
        assert torch.equal(model[0].seen, x)


@pytest.mark.parametrize(
    "way", ["grouped", "lean"]
)  # in slices autograd refuses: they share the argument's memory
def test_arguments_are_written_to_once(way, device):
    model, x = nn.Sequential(InPlace(), nn.Linear(4, 2)).to(device), torch.zeros(6, 4, device=device)
    dm.ClusteredMTL(model, K, Given(), **WAYS[way])(
        x, cluster=torch.tensor([0, 0, 1, 2, 2, 2], device=device)
    )
    assert torch.equal(x, torch.ones_like(x))


class Popping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x, conditions):
        return self.inner(x) * conditions.pop("scale")


def test_a_model_may_consume_its_arguments(options, device):
    mtl = dm.ClusteredMTL(Popping().to(device), K, Given(), **options)
    mtl(
        torch.randn(6, 4, device=device),
        {"scale": 2.0},
        cluster=torch.tensor([0, 0, 1, 2, 2, 2], device=device),
    )


class Decaying(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            self.last.weight.mul_(0.9)
        return self.last(self.first(x))


def test_parameters_in_one_flat_memory(options, device):
    torch.manual_seed(0)
    model = Decaying().to(device).double()
    vector_to_parameters(parameters_to_vector(model.parameters()).detach(), model.parameters())
    before = model.last.weight.detach().clone()
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    mtl.backward(sample_losses(mtl(x, cluster=torch.tensor(CLUSTER, device=device))))
    torch.testing.assert_close(model.last.weight.detach(), 0.9 * before)


class Replacing(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


def test_a_replaced_memory_is_refused(options, device):
    mtl = dm.ClusteredMTL(nn.Sequential(nn.Linear(4, 4), Replacing(4, 2)).to(device), K, Given(), **options)
    with pytest.raises(ValueError, match=r"found the .data of one replaced"):
        mtl(torch.randn(6, 4, device=device), cluster=torch.tensor(CLUSTER, device=device))


class Threshold(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 4))
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x):
        return nn.functional.linear(x, torch.tanh(self.weight - self.threshold))


def test_a_buffer_written_between_forward_and_backward_is_refused(device):
    model = Threshold().to(device)
    mtl = dm.ClusteredMTL(model, K, Given(), engine="grouped")
    losses = sample_losses(
        mtl(torch.randn(6, 4, device=device), cluster=torch.tensor(CLUSTER, device=device))
    )
    model.threshold.add_(0.5)
    with pytest.raises(RuntimeError, match="what sub was given has been written to since"):
        mtl.backward(losses)


def test_a_flag_within_an_argument_is_checked(options, device):
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x, condition):
            h = self.first(x)
            return self.last(h - h.mean(0) if condition["mix"] else h)

    mtl = dm.ClusteredMTL(Conditional().to(device), K, Given(), **options)
    x, cluster = torch.randn(6, 4, device=device), torch.tensor([0, 0, 1, 2, 2, 2], device=device)
    mtl.backward(sample_losses(mtl(x, {"mix": False}, cluster=cluster)))
    with pytest.raises((ValueError, RuntimeError), match="mixed"):
        mtl(x, {"mix": True}, cluster=cluster)


@pytest.mark.parametrize("memory", ["full", "lean"])
def test_a_rule_that_relies_on_what_is_in_the_buffer_is_found(memory, device, monkeypatch):
    monkeypatch.setattr(registry, "RULES", dict(RULES))

    @register_cluster_rule(nn.functional.linear, replace=True)
    class Wrong(ClusterRule):
        @staticmethod
        def forward(ctx, input, weight, bias=None):
            ctx.save_for_backward(input, weight)
            return input @ weight.T

        @staticmethod
        def backward(ctx, grad, clusters):
            input, weight = ctx.saved_tensors
            out = ctx.buffer(1)
            if out is None:
                out = weight.new_zeros(clusters.num, *weight.shape)
            for k, begin, end in clusters.spans(len(input)):  # an absent cluster's row is left as it is
                out[k] = grad[begin:end].T @ input[begin:end]
            return grad @ weight, out, None

    model = nn.Linear(4, 2, bias=False).to(device).double()
    mtl = dm.ClusteredMTL(model, K, Given(), engine="grouped", memory=memory)
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="weight: gradients formed by cluster do not add up"):
        mtl(x, cluster=torch.tensor([0, 0, 0, 2, 2, 2], device=device))
