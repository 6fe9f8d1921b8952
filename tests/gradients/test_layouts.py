"""Modules without a rule, samples that do not lie along dimension 0, and samples that are mixed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import CLUSTERS, assert_exact, in_slices, sample_losses
from torch import nn

import diffmtl_fast as dm

B = 6


class Model(nn.Module):
    """Two layers with something in between, a function of the model and its input."""

    def __init__(self, between, width=4, prepare=torch.add, **modules):
        super().__init__()
        self.before, self.after, self.between = nn.Linear(3, width), nn.LazyLinear(3), between
        self.prepare = prepare
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x, table=0):
        return self.after(self.between(self, self.before(self.prepare(x, table))))


def build(model, x, device):
    """Materialise lazy layers and draw the weights."""
    torch.manual_seed(0)
    model = model.to(device).double()
    x = torch.randn(x, dtype=torch.float64, device=device)
    with torch.no_grad():
        model(x)
    return model, x


def _time_first(model, x):
    return model.layer(x.transpose(0, 1)).transpose(0, 1)


def _attend_first(model, x):
    x = x.transpose(0, 1)
    return model.layer(x, x, x, need_weights=False)[0].transpose(0, 1)


def _attend(model, x):
    return model.layer(x, x, x)[0]


def _recurrent(model, x):
    state = torch.tanh(x[:, :1, :3]).transpose(0, 1).contiguous()
    out, (hidden, _) = model.layer(x.transpose(0, 1), (state, 2 * state))
    return out.transpose(0, 1) + hidden.transpose(0, 1)


@torch.library.custom_op("diffmtl_tests::cube_times", mutates_args=())
def cube_times(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x**3 * gain


def _cube_backward(ctx, grad):
    x, gain = ctx.saved_tensors
    return 3 * grad * x**2 * gain, (grad * x**3).flatten(0, -2).sum(0)


cube_times.register_autograd(
    _cube_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Cube(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]))

    def forward(self, x):
        return cube_times(x, self.gain)


class Written(nn.Module):
    """A token that is written into its place."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = x.clone()
        x[:, 0] = self.token
        return x


class WeightNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, training=self.training))


class InPlaceWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        weight = self.weight * 1
        weight[0] = 0
        return F.linear(x, weight)


def _layer(make):
    return lambda: Model(lambda m, x: m.layer(x), layer=make())


def _attention(**options):
    return nn.MultiheadAttention(4, 2, **options)


def _multihead(between, **options):
    return lambda: Model(between, layer=_attention(**options))


#: a model, the shape of its input, and what of it runs in slices (None: all of it)
SLICED = {
    "attention": (_multihead(_attend, batch_first=True), (B, 5, 3), ["layer"]),
    "attention, sequence first, 4 steps": (_multihead(_attend_first), (B, 4, 3), ["layer"]),
    "attention, sequence first, B steps": (_multihead(_attend_first), (B, B, 3), ["layer"]),
    "attention, sequence first, 2 B steps": (_multihead(_attend_first), (B, 2 * B, 3), ["layer"]),
    "linear, sequence first, 4 steps": (lambda: Model(_time_first, layer=nn.Linear(4, 4)), (B, 4, 3), None),
    "linear, sequence first, B steps": (lambda: Model(_time_first, layer=nn.Linear(4, 4)), (B, B, 3), None),
    "linear, sequence first, 2 B steps": (
        lambda: Model(_time_first, layer=nn.Linear(4, 4)),
        (B, 2 * B, 3),
        None,
    ),
    "linear, sequence first in a block": (
        lambda: Model(lambda m, x: m.block(x), 3, block=Model(_time_first, 3, layer=nn.Linear(3, 3))),
        (B, 2 * B, 3),
        ["block"],
    ),
    "transformer layer": (
        _layer(lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)),
        (B, 5, 3),
        ["layer.self_attn"],
    ),
    "LSTM": (
        lambda: Model(lambda m, x: m.layer(x)[0], layer=nn.LSTM(4, 3, num_layers=2, batch_first=True)),
        (B, 5, 3),
        ["layer"],
    ),
    "GRU, both ways": (
        lambda: Model(lambda m, x: m.layer(x)[0], layer=nn.GRU(4, 2, batch_first=True, bidirectional=True)),
        (B, 5, 3),
        ["layer"],
    ),
    "LSTM with a state, sequence first": (
        lambda: Model(_recurrent, layer=nn.LSTM(4, 3)),
        (B, 6, 3),
        ["layer"],
    ),
    "custom operation": (_layer(Cube), (B, 5, 3), ["layer"]),
    "bilinear": (
        lambda: Model(lambda m, x: m.layer(x, torch.tanh(x)), layer=nn.Bilinear(4, 4, 2)),
        (B, 3),
        ["layer"],
    ),
    "transposed convolution": (
        lambda: Model(lambda m, x: m.layer(x.transpose(1, 2)), layer=nn.ConvTranspose1d(4, 2, 2)),
        (B, 5, 3),
        ["layer"],
    ),
    "rows folded": (
        lambda: Model(
            lambda m, x: m.layer(x.flatten(0, 1)).unflatten(0, (-1, 5)), layer=nn.Sequential(Cube())
        ),
        (B, 5, 3),
        ["layer.0"],
    ),
    "written token": (_layer(Written), (B, 5, 3), ["layer"]),
    "weight written in place": (_layer(InPlaceWeight), (B, 5, 3), ["layer"]),
    "batch norm in evaluation mode": (
        lambda: Model(lambda m, x: m.layer(x.transpose(1, 2)), layer=nn.BatchNorm1d(4)).eval(),
        (B, 5, 3),
        ["layer"],
    ),
    "a parameter in slices and outside": (
        lambda: Model(lambda m, x: m.layer(x) * m.layer.gain, layer=Cube()),
        (B, 5, 3),
        ["layer"],
    ),
}


@pytest.mark.parametrize("engine", ["auto", "sliced", "lean"])
@pytest.mark.parametrize("name", SLICED)
def test_modules_without_a_rule_are_exact(name, engine, device):
    make, shape, expected = SLICED[name]
    options = {"engine": "auto", "memory": "lean"} if engine == "lean" else {"engine": engine}
    if engine == "lean" and expected is None:
        pytest.skip("lean memory needs the grouped engine")
    clusters = list(CLUSTERS.values())
    mtl = assert_exact(*build(make(), shape, device), cluster=clusters, options=options)
    assert in_slices(mtl) == (None if engine == "sliced" else expected)


class Training(nn.Module):
    """Mixes samples in training mode only."""

    def forward(self, x):
        return x - x.mean(0) if self.training else x


def _across_the_batch(model, x):
    return model.layer(x[None], x[None], x[None])[0][0]


#: what some samples have an effect on others by; the strength is a thousandth of the rest where it is not all
MIXED = {
    "mean": lambda m, x: x - x.mean(0),
    "a little of the mean": lambda m, x: x + 0.01 * x.mean(0),
    "softmax over the batch": lambda m, x: F.softmax(x @ x.T, -1) @ x,
    "neighbours": lambda m, x: x + 0.1 * x.roll(1, 0),
    "deviation of the batch": lambda m, x: x + x.std(0).mean(),
    "unit length over the batch": lambda m, x: F.normalize(x, dim=0),
    "batch statistics without a module": lambda m, x: F.batch_norm(x, None, None, training=True),
    "through a gate that is closed": lambda m, x: x + m.gate * (x - x.mean(0)),
    "maximum": lambda m, x: x - x.amax(),
    "attention": _across_the_batch,
    "in training mode": lambda m, x: m.training_only(x),
}


def make_mixing(name, device, dtype):
    torch.manual_seed(0)
    model = Model(MIXED[name], layer=_attention(batch_first=True), training_only=Training())
    model.register_parameter("gate", nn.Parameter(torch.zeros(4)))
    model, x = model.to(device), torch.randn(B, 3, device=device)
    with torch.no_grad():
        model(x)
    return (model.to(dtype), x.to(dtype)) if dtype else (model, x)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, None], ids=["float32", "bfloat16", "autocast"]
)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_samples_are_refused(name, dtype, device):
    cluster = torch.tensor([0, 0, 1, 2, 2, 2], device=device)
    refusals = {
        "auto": (ValueError, "others' rows change it"),
        "sliced": (ValueError, "others' rows change it"),
    }
    refusals["grouped"] = (
        RuntimeError,
        r"engine='grouped': .*(samples are mixed|slices of it)",
    )
    for engine, (error, message) in refusals.items():
        model, x = make_mixing(name, device, dtype)
        mtl = dm.ClusteredMTL(model, 3, dm.PCGrad(), engine=engine)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is None):
            for _ in range(2):  # the first refusal is not the last
                with pytest.raises(error, match=message):
                    mtl(x, cluster=cluster)


@pytest.mark.parametrize("engine", ["auto", "sliced"])
def test_a_change_of_mode_is_checked(engine, device):
    model, x = make_mixing("in training mode", device, torch.float64)
    mtl = assert_exact(model.eval(), x, options={"engine": engine})
    model.train()
    with pytest.raises(ValueError, match="others' rows change it"):
        mtl(x, cluster=torch.tensor([0, 0, 1, 2, 2, 2], device=device))


@pytest.mark.parametrize("engine", ["auto", "sliced"])
def test_a_batch_of_one_sample_does_not_stand_for_larger_ones(engine, device):
    model, x = make_mixing("neighbours", device, torch.float64)
    mtl = assert_exact(model, x[:1], cluster=[1], options={"engine": engine})
    with pytest.raises(ValueError, match="others' rows change it"):
        mtl(x, cluster=torch.tensor([0, 0, 1, 2, 2, 2], device=device))


class Flagged(Model):
    """Mixes samples if it is told to."""

    def forward(self, x, mix=False):
        x = self.before(x)
        return self.after(x - x.mean(0) if mix else x)


@pytest.mark.parametrize("engine", ["auto", "sliced"])
def test_a_change_of_flags_is_checked(engine, device):
    model, x = build(Flagged(None), (B, 3), device)
    mtl = assert_exact(model, x, mix=False, options={"engine": engine})
    cluster = torch.tensor([0, 0, 1, 2, 2, 2], device=device)
    mtl(x[:1], mix=True, cluster=cluster[:1])  # a single sample can't tell
    with pytest.raises(ValueError, match="others' rows change it"):
        mtl(x, mix=True, cluster=cluster)
    assert_exact(model, x, mix=False, options={"engine": engine})


def test_mixing_of_what_no_parameter_has_touched_is_exact(device):
    model = Model(lambda m, x: x, prepare=lambda x, _: x - x.mean(0))
    mtl = assert_exact(
        *build(model, (B, 3), device), cluster=[0, 0, 1, 2, 2, 2], options={"engine": "grouped"}
    )
    assert in_slices(mtl) == []


@pytest.mark.parametrize("engine", ["auto", "grouped", "sliced"])
def test_arguments_of_the_whole_batch_that_look_like_samples(engine, device):
    model, x = build(Model(lambda m, x: x), (B, B, 3), device)
    table = torch.randn(B, 3, dtype=torch.float64, device=device)  # as many positions as samples
    mtl = dm.ClusteredMTL(model, 3, dm.PCGrad(), engine=engine)
    with pytest.raises(ValueError, match=r"name it in shared="):
        mtl(x, table, cluster=torch.tensor([2, 0, 2, 1, 0, 2], device=device))
    assert_exact(model, x, table, options={"engine": engine, "shared": [1]})
    assert_exact(model, x, table=table, options={"engine": engine, "shared": ["table"]})


@pytest.mark.parametrize("engine", ["auto", "grouped", "sliced"])
def test_lists_of_samples_are_not_put_in_order_silently(engine, device):
    model, x = build(Model(lambda m, x: x, prepare=lambda x, _: torch.stack(list(x))), (B, 5, 3), device)
    mtl = dm.ClusteredMTL(model, 3, dm.PCGrad(), engine=engine)
    with pytest.raises((ValueError, RuntimeError)):
        mtl(list(x), cluster=torch.tensor([2, 0, 2, 1, 0, 2], device=device))
    if engine != "sliced":
        assert_exact(model, list(x), cluster=[0, 0, 1, 2, 2, 2], options={"engine": engine})


@pytest.mark.parametrize(
    "mix",
    [
        lambda losses: losses / losses.mean(),
        lambda losses: losses + 1e-3 * losses.var(),
        lambda losses: losses.flip(0),
    ],
    ids=["normalised", "variance", "another order"],
)
@pytest.mark.parametrize("engine", ["grouped", "sliced"])
def test_losses_that_mix_samples_are_refused(mix, engine, device):
    model, x = build(Model(lambda m, x: x), (B, 3), device)
    cluster = torch.tensor([2, 0, 2, 1, 0, 2], device=device)
    mtl = dm.ClusteredMTL(model, 3, dm.PCGrad(), engine=engine)
    with pytest.raises(ValueError, match="loss: expected the loss of each sample to depend on that sample's"):
        mtl.backward(mix(sample_losses(mtl(x, cluster=cluster))))
    assert all(p.grad is None for p in model.parameters())
    weights = losses = sample_losses(mtl(x, cluster=cluster))
    mtl.backward(losses / weights.mean().detach())  # a factor is none of the losses' dependences


def test_a_dimension_0_that_is_not_the_batch_is_noticed_in_the_loss(device):
    model, x = build(
        Model(lambda m, x: x), (B, B, 3), device
    )  # [time, batch, ...], as much of one as of the other
    mtl = dm.ClusteredMTL(model, 3, dm.PCGrad())
    with pytest.raises(ValueError, match="loss: expected the loss of each sample to depend on that sample's"):
        mtl.backward(
            sample_losses(mtl(x, cluster=torch.tensor([0, 0, 1, 2, 2, 2], device=device)).transpose(0, 1))
        )


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.layer(x)


def test_a_module_that_updates_its_buffers_is_not_sliced_silently(device):
    model, x = build(Model(lambda m, x: m.layer(x), layer=Spectral()), (B, 3), device)
    mtl = dm.ClusteredMTL(model, 3, dm.PCGrad(), engine="sliced")
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ValueError, match=r"found '_[uv]' of 'layer.layer.parametrizations.weight.0' updated"):
        mtl(x, cluster=torch.tensor([0, 0, 1, 2, 2, 2], device=device))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert in_slices(assert_exact(model, x)) == []  # as a whole it is updated once
    assert_exact(model.eval(), x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


def test_buffers_and_random_numbers_are_those_of_one_forward(device):
    model, x = build(Model(lambda m, x: F.dropout(m.layer(x)), layer=Counting()), (B, 3), device)
    model.layer.calls.zero_()
    mtl = dm.ClusteredMTL(model, 3, dm.PCGrad(), engine="grouped")
    cluster = torch.tensor([0, 0, 1, 2, 2, 2], device=device)
    for step in range(1, 4):
        torch.manual_seed(step)
        losses = sample_losses(mtl(x, cluster=cluster))
        state = torch.get_rng_state()
        assert model.layer.calls == step
        mtl.backward(losses)
        torch.manual_seed(step)
        with torch.no_grad():
            model(x)
        assert torch.equal(torch.get_rng_state(), state)
        model.layer.calls -= 1


def test_random_weights_are_not_grouped(device):
    model, x = build(Model(lambda m, x: m.layer(x), layer=WeightNoise()), (B, 3), device)
    mtl = dm.ClusteredMTL(model, 3, dm.PCGrad())
    mtl(x, cluster=torch.tensor([0, 0, 1, 2, 2, 2], device=device))
    assert in_slices(mtl) == ["layer"]


def test_control_flow_at_random(device):
    """Paths that no check has seen yet are checked when they come up."""
    torch.manual_seed(0)
    model, x = build(Model(_at_random, layer=nn.Linear(4, 4), other=Cube()), (B, 3), device)
    mtl = assert_exact(model, x, steps=8)
    assert in_slices(mtl) == ["other"]


def _at_random(model, x):
    return model.layer(x) if torch.rand(()) < 0.5 else model.other(torch.tanh(x))
