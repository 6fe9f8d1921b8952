"""What the checks of a model find, when they come, and what they cost."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from exactness import WAYS, Given, K, assert_exact, in_slices, sample_losses
from torch import nn

import diffmtl_fast as dm
from diffmtl_fast.gradients import model_check

SORTED, UNSORTED = [0, 0, 1, 2, 2, 2], [2, 0, 2, 1, 0, 2]


class Mixing(nn.Module):
    """Mixes samples where `when` says so, given the hidden rows."""

    def __init__(self, when):
        super().__init__()
        self.first, self.last, self.when, self.calls = nn.Linear(4, 4), nn.Linear(4, 3), when, []

    def forward(self, x):
        self.calls.append(len(x))
        return self.last(self.mix(self.first(x)))

    def mix(self, h):
        return h - h.mean(0) if self.when(h) else h


def step(mtl, size, device, order=SORTED):
    x = torch.randn(size, 4, device=device)
    cluster = (order * 4)[:size]
    cluster = torch.tensor(sorted(cluster) if order == SORTED else cluster, device=device)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))


@pytest.mark.parametrize(
    ("when", "sizes"),
    [(lambda h: len(h) > 8, (8, 9)), (lambda h: len(h) < 8, (9, 6)), (lambda h: len(h) % 2 == 1, (6, 8, 9))],
)
def test_every_new_batch_size_is_checked(when, sizes, options, device):
    mtl = dm.ClusteredMTL(Mixing(when).to(device), K, Given(), **options)

    def train():
        for size in sizes:
            step(mtl, size, device)

    # Slices are batches of other sizes: what mixes in them shows before.
    with pytest.raises((ValueError, RuntimeError), match=r"mixed|slices of (it|the batch)"):
        train()


def test_batch_sizes_are_checked_up_to_a_stated_number(caplog, device, monkeypatch):
    monkeypatch.setattr(model_check, "MAX_BATCH_SIZES", 3)
    mtl = dm.ClusteredMTL(Mixing(lambda h: False).to(device), K, Given())
    with caplog.at_level(logging.INFO, "diffmtl_fast"):
        for size in (6, 7, 8, 9, 10, 6, 7):
            step(mtl, size, device)
    checked = [message for message in caplog.messages if "checked the model" in message]
    assert [message.split("batch of ")[1].split()[0] for message in checked] == ["6", "7", "8"]


@pytest.mark.parametrize("order", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
def test_mixing_that_begins_later_is_found_by_a_spot_check(order, options, device):
    model = Mixing(lambda h: model.mixes).to(device)
    model.mixes = False
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    for _ in range(20):
        step(mtl, 6, device, order)
    model.mixes = True
    for _ in range(64 - 20):
        step(mtl, 6, device, order)
    with pytest.raises(
        ValueError, match=r"samples are mixed since.*(first|last|the model itself).* 48 steps ago"
    ):
        step(mtl, 6, device, order)


def test_a_spot_check_costs_three_forwards(options, device, monkeypatch):
    """So one in 1024 steps is at most a thousandth of training, whatever the model."""
    model = Mixing(lambda h: False).to(device)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    per_step = len(set(SORTED)) if options == WAYS["sliced"] else 1
    step(mtl, 6, device)
    counts = []
    for _ in range(max(model_check.SPOT_CHECKS)):
        before = len(model.calls)
        step(mtl, 6, device)
        counts.append(len(model.calls) - before - per_step)
    spots = [i + 1 for i, extra in enumerate(counts) if extra]
    assert spots == list(model_check.SPOT_CHECKS)
    assert max(counts) <= 4  # slices warm up once more
    assert model_check.SPOT_CHECK_EVERY >= 1024


# Gradients that are no sums of the samples' own, and those that go astray.


@pytest.mark.parametrize("order", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
def test_frequencies_are_those_of_the_whole_batch(order, options, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True, padding_idx=1), nn.Linear(3, 2))
    model, index = model.to(device).double(), torch.randint(4, (6, 5), device=device)
    if options == WAYS["sliced"]:
        mtl = dm.ClusteredMTL(model, K, Given(), **options)
        with pytest.raises(ValueError, match=r"found that those of \['0.weight'\].*frequencies in the batch"):
            mtl(index, cluster=torch.tensor(order, device=device))
    else:
        assert in_slices(assert_exact(model, index, cluster=order, options=options)) == []


def test_sparse_gradients_are_refused_by_name(options, device):
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2)).to(device)
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    with pytest.raises((ValueError, RuntimeError), match=r"a sparse one of '0.weight'.*sparse=False"):
        mtl(torch.randint(4, (6, 5), device=device), cluster=torch.tensor(SORTED, device=device))


class Averaging(torch.autograd.Function):
    """Its backward mixes what its forward does not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


def test_gradients_that_are_normalised_over_the_batch_are_refused_by_name(device):
    model = nn.Sequential(nn.Linear(4, 4), Mixing(lambda h: False)).to(device)
    model[1].mix = Averaging.apply
    mtl = dm.ClusteredMTL(model, K, Given())
    with pytest.raises(ValueError, match=r"found that those of \[.*'0.weight'.*normalised over it"):
        mtl(torch.randn(6, 4, device=device), cluster=torch.tensor(SORTED, device=device))


DERIVED_AND_RAW = {
    "layer norm": lambda m, x: F.layer_norm(x, (4,), 1 + m.b, m.b),
    "layer norm, raw first": lambda m, x: F.layer_norm(x, (4,), m.b, 1 + m.b),
    "group norm": lambda m, x: F.group_norm(x, 2, 1 + m.b, m.b),
    "linear": lambda m, x: F.linear(x, m.w * m.b[:, None], m.b),
    "linear, weight first": lambda m, x: F.linear(x, m.w, m.w.sum(1)),
    "linear, of one": lambda m, x: F.linear(x, m.b.outer(m.b), m.b),
    "convolution": lambda m, x: F.conv1d(x[..., None], (m.w * m.b)[..., None], m.b)[..., 0],
    "twice raw": lambda m, x: F.layer_norm(x, (4,), m.b, m.b),
    "used before": lambda m, x: F.layer_norm(x * m.b, (4,), 1 + m.b, m.b) + m.b,
}


@pytest.mark.parametrize("name", DERIVED_AND_RAW)
def test_a_parameter_raw_and_computed_with_in_one_operation(name, options, device):
    torch.manual_seed(0)
    model = Using(DERIVED_AND_RAW[name]).to(device).double()
    mtl = assert_exact(model, torch.randn(6, 4, dtype=torch.float64, device=device), options=options)
    assert in_slices(mtl) in ([], None)


class Using(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.b, self.w, self.function = (
            nn.Parameter(torch.full((4,), 0.5)),
            nn.Parameter(torch.rand(4, 4)),
            function,
        )

    def forward(self, x):
        return self.function(self, x)


# Models that write their own parameters.


class Forced(nn.Module):
    """A linear layer that normalises its own weight in training, as EDM2's do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(F.normalize(self.weight, dim=1))
        return F.linear(x, F.normalize(self.weight, dim=1))


class Decaying(Forced):
    """What is written depends on how often it is."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return F.linear(x, self.weight)


@pytest.mark.parametrize("kind", [Forced, Decaying])
def test_a_forward_writes_its_parameters_once(kind, options, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), kind(), nn.SiLU(), nn.Linear(4, 2)).to(device).double()
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    before = model[1].weight.detach().clone()
    mtl = assert_exact(model, x, steps=3, options=options)  # the reference's parameters are written as often
    assert in_slices(mtl) in ([], None)
    expected = before * 0.9**3 if kind is Decaying else F.normalize(before, dim=1)
    torch.testing.assert_close(model[1].weight.detach(), expected)


# What slices can do where the batch as a whole can't.


def _score(m, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = m.first(torch.tanh(m.first(x))).square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def _written(m, x):
    h = x.clone()
    h[:, 1] = m.gain[0]
    return h


def _filled(m, x):
    return x.masked_fill(x > 0, 0.0) + torch.where(x > 0, m.gain[0], 0.0 * x)


@torch.jit.script
def _scripted(x, gain):
    return torch.tanh(x * gain)


BY_SLICES = {
    "written into a constant": _written,
    "filled": _filled,
    "vmap of a module": lambda m, x: torch.vmap(m.first)(x),
    "score of an energy": _score,
    "complex numbers": lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.pairs), n=4),
    "scripted": lambda m, x: _scripted(x, m.gain),
}


class Varied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Linear(4, 4), function
        self.gain, self.pairs = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(3, 2))

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("order", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("name", BY_SLICES)
def test_auto_falls_back_to_slices(name, order, device):
    torch.manual_seed(0)
    model, x = (
        Varied(BY_SLICES[name]).to(device).double(),
        torch.randn(6, 4, dtype=torch.float64, device=device),
    )
    assert_exact(model, x, cluster=order)


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: nn.GRU(4, 3, batch_first=True), lambda m, x: m(x)[0]),
        (lambda: nn.LSTM(4, 3, batch_first=True), lambda m, x: m(x)[0]),
        (
            lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            lambda m, x: m(x, x, x, need_weights=False)[0],
        ),
    ],
    ids=["GRU", "LSTM", "attention"],
)
def test_a_module_without_a_rule_that_comes_first_runs_in_slices_alone(make, call, memory, device):
    torch.manual_seed(0)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = make(), nn.LazyLinear(2)

        def forward(self, x):
            return self.last(call(self.inner, x))

    model, x = First().to(device), torch.randn(6, 5, 4, dtype=torch.float64, device=device)
    model(x.float())
    mtl = assert_exact(model.double(), x, options={"memory": memory})
    assert in_slices(mtl) == ["inner"]


# Reasons.


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def test_noise_in_evaluation_mode_is_named(device):
    model = nn.Sequential(nn.Linear(4, 4), Noisy(), nn.Linear(4, 2)).to(device).double()
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    assert in_slices(assert_exact(model, x, cluster=SORTED)) == []
    for order, engine in [(UNSORTED, "auto"), (SORTED, "sliced"), (UNSORTED, "sliced")]:
        mtl = dm.ClusteredMTL(model, K, Given(), engine=engine)
        with pytest.raises(ValueError, match=r"random numbers in evaluation mode, found some drawn by '1'"):
            mtl(x, cluster=torch.tensor(order, device=device))


class Drifting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        self.scale.mul_(1.5)
        return x * self.scale


def test_a_buffer_that_drifts_is_no_matter_of_the_order(device):
    model = nn.Sequential(nn.Linear(4, 4), Drifting(), nn.Linear(4, 2)).to(device).double()
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    assert_exact(model, x, cluster=UNSORTED, options={"engine": "grouped"})
    with pytest.raises(ValueError, match=r"found 'scale' of '1' updated"):
        dm.ClusteredMTL(model, K, Given(), engine="sliced")(x, cluster=torch.tensor(UNSORTED, device=device))


def test_clear_words_for_what_can_not_be_done(device):
    x, cluster = torch.randn(6, 4, device=device), torch.tensor(SORTED, device=device)

    class PerRow(nn.Module):
        def __init__(self, dtype=torch.float32):
            super().__init__()
            self.inner, self.rows = nn.Linear(4, 3), nn.Parameter(torch.ones(6, 1, dtype=dtype))

        def forward(self, x):
            return self.inner(x) * self.rows.real

    for make, message in [
        (lambda: nn.Sequential(PerRow()), "error in '0' on a part of the batch"),
        (lambda: nn.Sequential(PerRow(torch.complex64)), "found torch.complex64 at '0.rows'"),
    ]:
        mtl = dm.ClusteredMTL(make().to(device), K, Given(), engine="sliced")
        with pytest.raises(ValueError, match=message):
            mtl(x, cluster=cluster)


def test_layers_without_elements_are_exact(options, device):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.some, self.of_none = nn.Linear(4, 0), nn.Linear(4, 3), nn.Linear(0, 2)

        def forward(self, x):
            return torch.cat([self.none(x), self.some(x), self.of_none(self.none(x))], 1)

    with pytest.warns(UserWarning, match="zero-element"):
        model = Empty().to(device).double()
    assert_exact(model, torch.randn(6, 4, dtype=torch.float64, device=device), options=options)


# Losses.


def test_a_loss_of_another_kind_is_checked_although_its_last_operation_is_known(options, device):
    model, x = nn.Linear(4, 2).to(device), torch.randn(6, 4, device=device)
    mtl, cluster = dm.ClusteredMTL(model, K, Given(), **options), torch.tensor(SORTED, device=device)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)) * 1.0)
    losses = sample_losses(mtl(x, cluster=cluster))
    with pytest.raises(ValueError, match="the loss of each sample to depend on that sample's"):
        mtl.backward(losses * losses.mean())
    mtl.backward((mtl(x, cluster=cluster) - 1).square().mean(1))
    with pytest.raises(ValueError, match="the loss of each sample to depend on that sample's"):
        mtl.backward((mtl(x, cluster=cluster).T @ torch.ones(6, 6, device=device)).square().mean(0))


def test_a_skipped_step_leaves_nothing_behind(options, device):
    """As `if loss.isnan(): continue` does, with the skipped loss still alive at the next forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).to(device).double()
    x, cluster = (
        torch.randn(2, 6, 4, dtype=torch.float64, device=device),
        torch.tensor(UNSORTED, device=device),
    )
    found = []
    for skip in (False, True):
        mtl = dm.ClusteredMTL(model, K, Given(), **options)
        mtl.backward(sample_losses(mtl(x[0], cluster=cluster)))
        model.zero_grad()
        if skip:
            losses = sample_losses(mtl(x[1], cluster=cluster))
        losses = sample_losses(mtl(x[0], cluster=cluster))
        mtl.backward(losses)
        found.append((mtl.last.gramian, *(p.grad.clone() for p in model.parameters())))
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_skipped_plain_step_is_no_lost_gradient(device):
    model, x = nn.Linear(4, 2).to(device), torch.randn(6, 4, device=device)
    mtl, cluster = dm.ClusteredMTL(model, K, dm.Equal()), torch.tensor(SORTED, device=device)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))
    mtl(x, cluster=cluster)  # skipped
    model.zero_grad(set_to_none=False)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))


def test_gradients_of_parameters_by_autograd(options, device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).to(device).double()
    x, cluster = torch.randn(6, 4, dtype=torch.float64, device=device), torch.tensor(UNSORTED, device=device)
    expected = torch.autograd.grad(sample_losses(model(x)).sum(), list(model.parameters()))
    mtl = dm.ClusteredMTL(model, K, Given(), **options)
    losses = sample_losses(mtl(x, cluster=cluster))
    if options == WAYS["sliced"]:  # as the docstring says
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(losses.sum(), list(model.parameters()))
        return
    for a, b in zip(torch.autograd.grad(losses.sum(), list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weighting", [dm.PCGrad, lambda: dm.UncertaintyWeighting(K), dm.NashMTL])
def test_what_contains_a_wrapper_loads_what_it_saved(weighting, device):
    def build():
        return nn.ModuleDict({"mtl": dm.ClusteredMTL(nn.Linear(4, 2), K, weighting())}).to(device)

    saved, other = build(), build()
    mtl, x = saved["mtl"], torch.randn(6, 4, device=device)
    mtl.backward(sample_losses(mtl(x, cluster=torch.tensor(SORTED, device=device))))
    for p in saved.parameters():
        p.data.add_(1.0)
    other.load_state_dict(saved.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))
    if isinstance(mtl.weighting, dm.NashMTL):
        assert other["mtl"].weighting.steps == 1
    assert list(mtl.state_dict()) == ["weight", "bias"]


def test_a_loss_on_another_device_is_refused():
    mtl = dm.ClusteredMTL(nn.Linear(4, 2), K, dm.Equal())
    loss = sample_losses(mtl(torch.randn(6, 4), cluster=torch.tensor(SORTED)))
    with pytest.raises(ValueError, match="loss: expected it on the model's device cpu, found meta"):
        mtl.backward(loss.to("meta"))
