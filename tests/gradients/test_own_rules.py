"""Rules for a user's own operations, a Python function and a custom operator, and how wrong rules are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from exactness import CLUSTERS, WAYS, Given, assert_exact, in_slices, sample_losses
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

import diffmtl_fast as dm
from diffmtl_fast.gradients import ClusterRule, Clusters, NoClusterRule, RuleContext, register_cluster_rule
from diffmtl_fast.gradients.rules import RULES
from diffmtl_fast.gradients.rules.autocast import lower_precision

B, K = 6, 3


@pytest.fixture(autouse=True)
def _own_rules(monkeypatch):
    """Let a test's rules end with it."""
    monkeypatch.setattr("diffmtl_fast.gradients.rules.registry.RULES", dict(RULES))


# An operation in Python: a low-rank product that keeps its narrow middle and nothing else.


def low_rank(x: Tensor, down: Tensor, up: Tensor, *, scale: float = 1.0) -> Tensor:
    """x [B, ..., in], down [rank, in], up [out, rank] → [B, ..., out]."""
    if has_torch_function((x, down, up)):
        return handle_torch_function(low_rank, (x, down, up), x, down, up, scale=scale)
    return scale * F.linear(F.linear(x, down), up)


class LowRankRule(ClusterRule):
    precision = staticmethod(lower_precision)

    @staticmethod
    def forward(ctx: RuleContext, x: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
        if x.dim() < 2:
            raise NoClusterRule("low_rank: expected a batch")
        rows = x.flatten(0, -2)
        middle = rows @ down.T
        ctx.save_for_backward(rows, down, up, middle)
        ctx.scale, ctx.shape = scale, x.shape
        return (scale * (middle @ up.T)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        rows, down, up, middle = ctx.saved_tensors
        grad = ctx.scale * grad.flatten(0, -2)
        by_middle = grad @ up
        offsets = clusters.offsets(len(rows))
        by_down = dm.ops.cluster_wgrad(by_middle, rows, offsets, out=ctx.buffer(1))
        by_up = dm.ops.cluster_wgrad(grad, middle, offsets, out=ctx.buffer(2))
        return (by_middle @ down).view(ctx.shape), by_down, by_up, None


class LowRank(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.randn(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return low_rank(x, self.down, up=self.up, scale=0.5)


# A custom operator, opaque to PyTorch, and cast by autocast as it was told.


@torch.library.custom_op("diffmtl_tests::film", mutates_args=())
def film(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """x [B, ..., C], gain [C], bias [C] → [B, ..., C]."""
    return x * gain.exp() + bias


film.register_fake(lambda x, gain, bias: torch.empty_like(x))
film.register_autograd(
    lambda ctx, grad: (
        grad * ctx.saved_tensors[1].exp(),
        (grad * ctx.saved_tensors[0]).flatten(0, -2).sum(0) * ctx.saved_tensors[1].exp(),
        grad.flatten(0, -2).sum(0),
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
for _device in ("cpu", "cuda"):
    film.register_autocast(_device, torch.bfloat16)


class FilmRule(ClusterRule):
    @staticmethod
    def precision(tensor: Tensor) -> Tensor:
        lower = torch.is_autocast_enabled(tensor.device.type) and tensor.dtype == torch.float32
        return tensor.bfloat16() if lower else tensor

    @staticmethod
    def forward(ctx: RuleContext, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return film(x, gain, bias)

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        offsets = clusters.offsets(len(rows))
        by_gain = dm.ops.cluster_sum((grad * x).flatten(0, -2), offsets) * gain.exp()
        return grad * gain.exp(), by_gain, dm.ops.cluster_sum(rows, offsets)


class Film(nn.Module):
    """It calls its operator by one of the operator's names."""

    def __init__(self, call: Callable[..., Tensor], width: int) -> None:
        super().__init__()
        self.call = call
        self.gain, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.gain, self.bias)


def call_film(*args: Tensor) -> Tensor:  # a module that holds the operator itself could not be copied
    return film(*args)


def call_packet(*args: Tensor) -> Tensor:
    return torch.ops.diffmtl_tests.film(*args)


def call_overload(*args: Tensor) -> Tensor:
    return torch.ops.diffmtl_tests.film.default(*args)


def low_rank_model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), LowRank(4, 2), nn.Tanh(), nn.Linear(4, 3))


def film_model(call: Callable[..., Tensor] = call_film) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), Film(call, 4), nn.Tanh(), nn.Linear(4, 3))


OPERATIONS = {"low_rank": (low_rank, LowRankRule, low_rank_model), "film": (film, FilmRule, film_model)}


def make(model: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    return model().to(device, dtype), torch.randn(B, 2, 5).to(device, dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_rule_is_exact_and_spares_the_slices(name, way, device):
    operation, rule, model = OPERATIONS[name]
    module, x = make(model, device)
    without = assert_exact(module, x, options=WAYS[way])
    assert in_slices(without) == (None if way == "sliced" else ["1"])
    assert register_cluster_rule(operation)(rule) is rule
    for cluster in CLUSTERS.values():
        mtl = assert_exact(module, x, cluster=cluster, options=WAYS[way])
        assert in_slices(mtl) == (None if way == "sliced" else [])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_under_autocast(name, way, device):
    operation, rule, model = OPERATIONS[name]
    register_cluster_rule(operation)(rule)
    module, x = make(model, device, torch.float32)
    context = functools.partial(torch.autocast, device.type, torch.bfloat16)
    with context():
        assert module[1](x[..., :4]).dtype == torch.bfloat16
    # A few roundings of 2^-9 each: the reference rounds every cluster's sums once more than the rule does.
    mtl = assert_exact(module, x, rtol=0.02, context=context, options=WAYS[way])
    assert in_slices(mtl) == (None if way == "sliced" else [])


@pytest.mark.parametrize("name", OPERATIONS)
def test_frozen_parameters(name, device):
    operation, rule, model = OPERATIONS[name]
    register_cluster_rule(operation)(rule)
    module, x = make(model, device)
    next(module[1].parameters()).requires_grad_(False)
    assert in_slices(assert_exact(module, x)) == []


@pytest.mark.parametrize(
    "registered", [film, torch.ops.diffmtl_tests.film, torch.ops.diffmtl_tests.film.default]
)
@pytest.mark.parametrize("call", [call_film, call_packet, call_overload])
def test_an_operator_is_one_operation_by_any_name(registered, call, device):
    register_cluster_rule(registered)(FilmRule)
    module, x = make(functools.partial(film_model, call), device)
    assert in_slices(assert_exact(module, x)) == []


def test_arguments_without_a_rule_go_to_slices(device):
    class Picky(LowRankRule):
        @staticmethod
        def forward(ctx: RuleContext, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
            return LowRankRule.forward(ctx, x, down, up)

    register_cluster_rule(low_rank)(Picky)  # does not know scale=
    module, x = make(low_rank_model, device)
    assert in_slices(assert_exact(module, x)) == ["1"]

    class Demanding(LowRankRule):
        @staticmethod
        def forward(ctx: RuleContext, x: Tensor, down: Tensor, up: Tensor, scale: float, mode: str) -> Tensor:
            raise AssertionError(mode)

    register_cluster_rule(low_rank, replace=True)(Demanding)
    assert in_slices(assert_exact(module, x)) == ["1"]


# Wrong rules.


def take_step(rule: type[ClusterRule], device: torch.device, **options: object) -> None:
    register_cluster_rule(film)(rule)
    module, x = make(film_model, device)
    mtl = dm.ClusteredMTL(module, K, Given(), **options)
    mtl.backward(sample_losses(mtl(x, cluster=torch.tensor(CLUSTERS["sorted"], device=device))))


WRONG = {
    "sum over clusters": (
        lambda x, gain, bias: (x, gain.sum(0), bias),
        ValueError,
        r"rule Wrong of film: expected the gradients of 'gain' by cluster, \[3, 4\], found \[4\]",
    ),
    "missing parameter": (
        lambda x, gain, bias: (x, gain, None),
        ValueError,
        r"rule Wrong of film: expected the gradients of 'bias' by cluster, \[3, 4\], found None",
    ),
    "too few": (
        lambda x, gain, bias: (x, gain),
        TypeError,
        "rule Wrong of film: expected a tuple of 3 gradients, one per argument, found 2",
    ),
    "too many": (
        lambda x, gain, bias: (x, gain, bias, None),
        TypeError,
        "rule Wrong of film: expected a tuple of 3 gradients, one per argument, found 4",
    ),
    "no tuple": (
        lambda x, gain, bias: gain,
        TypeError,
        "rule Wrong of film: expected a tuple of 3 gradients, one per argument, found Tensor",
    ),
}


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_refused(name, memory, device):
    spoil, error, message = WRONG[name]

    class Wrong(FilmRule):
        @staticmethod
        def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
            return spoil(*FilmRule.backward(ctx, grad, clusters))

    with pytest.raises(error, match=message):
        take_step(Wrong, device, memory=memory)


def test_a_second_rule_is_refused_unless_it_is_to_replace_the_first(device):
    register_cluster_rule(film)(FilmRule)
    for again in (film, torch.ops.diffmtl_tests.film.default):
        with pytest.raises(ValueError, match="without a rule, found FilmRule for film; pass replace=True"):
            register_cluster_rule(again)
    with pytest.raises(ValueError, match="without a rule, found Linear for linear"):
        register_cluster_rule(F.linear)

    class Other(FilmRule):
        pass

    register_cluster_rule(film, replace=True)(Other)
    module, x = make(film_model, device)
    assert in_slices(assert_exact(module, x)) == []


def test_rules_that_can_be_none_are_refused():
    class WithoutBackward(ClusterRule):
        forward = FilmRule.forward

    class Open(FilmRule):
        @staticmethod
        def forward(ctx: RuleContext, x: Tensor, *parameters: Tensor) -> Tensor:
            return FilmRule.forward(ctx, x, *parameters)

    with pytest.raises(TypeError, match="expected WithoutBackward to define backward, found none"):
        register_cluster_rule(film)(WithoutBackward)
    with pytest.raises(TypeError, match=r"expected Open\.forward to name every argument, found \* or"):
        register_cluster_rule(film)(Open)
    with pytest.raises(TypeError, match="expected a subclass of ClusterRule, found 3"):
        register_cluster_rule(film)(3)
    with pytest.raises(TypeError, match="operation: expected a function, found 'film'"):
        register_cluster_rule("film")
    register_cluster_rule(film)(FilmRule)  # none of them was kept
