"""Parameters used where no tensor subclass is seen: exact in slices, or refused by name; never silently wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import WAYS, Given, K, assert_exact, in_slices, sample_losses
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import diffmtl_fast as dm

CLUSTERS = {"batch": [2, 0, 2, 1, 0, 2], "one sample": [1]}


class Square(torch.autograd.Function):
    """x p²; as compiled code would, it takes the parameter for a plain tensor."""

    @staticmethod
    def forward(ctx, x, p):
        with torch._C.DisableTorchFunctionSubclass():
            ctx.save_for_backward(x, p)
            return x * p**2

    @staticmethod
    def backward(ctx, grad):
        with torch._C.DisableTorchFunctionSubclass():
            x, p = ctx.saved_tensors
            return grad * p**2, (2 * grad * x * p).sum(0)


class Visible(Square):
    """The same in PyTorch's own operations."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x * p**2

    @staticmethod
    def backward(ctx, grad):
        x, p = ctx.saved_tensors
        return grad * p**2, (2 * grad * x * p).sum(0)


class Rounded(torch.autograd.Function):
    """Quantisation with a straight-through gradient."""

    @staticmethod
    def forward(ctx, weight):
        return torch.round(8 * weight) / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Using(nn.Module):
    """Uses its parameters p [4] and q [4, 4] by a given function."""

    def __init__(self, function):
        super().__init__()
        self.p, self.q, self.function = (
            nn.Parameter(torch.rand(4) + 0.5),
            nn.Parameter(torch.randn(4, 4)),
            function,
        )

    def forward(self, x):
        return self.function(self, x)


def build(function, device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Using(function), nn.Linear(4, 2)).to(device).double()


USES = {
    "of a batch and a parameter": lambda m, x: Square.apply(x, m.p) @ m.q,
    "after another operation": lambda m, x: Square.apply(x @ m.q, m.p),
    "in visible operations": lambda m, x: Visible.apply(x, m.p) @ m.q,
    "of a parameter alone": lambda m, x: F.linear(x, Rounded.apply(m.q)) * m.p,
    "of a computed parameter": lambda m, x: F.linear(x, Rounded.apply(2 * m.q)) * m.p,
    "beside a visible use": lambda m, x: Square.apply(x * m.p, Rounded.apply(m.p)) @ m.q,
    "in a checkpoint": lambda m, x: checkpoint(lambda y: Square.apply(y, m.p), x, use_reentrant=False) @ m.q,
}


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
@pytest.mark.parametrize("name", USES)
def test_modules_with_unseen_uses_run_in_slices(name, cluster, options, device):
    x = torch.randn(len(cluster), 4, dtype=torch.float64, device=device)
    mtl = assert_exact(build(USES[name], device), x, cluster=cluster, options=options)
    alone = name in ("of a parameter alone", "of a computed parameter")  # a parameter computed from another
    assert in_slices(mtl) == (None if options == WAYS["sliced"] else [] if alone else ["1"])


class Written(nn.Module):
    """Writes a parameter into a table: one that it makes in every forward, a view of it, or one that it keeps."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.p = kind, nn.Parameter(torch.randn(4))
        self.register_buffer("kept", torch.zeros(4, 4), persistent=False)

    def forward(self, x):
        table = torch.zeros_like(self.kept)
        if self.kind == "kept":
            table = self.kept
            table.detach_().zero_()
        if self.kind == "a view":
            table[1][:] = self.p
        else:
            table[1] = self.p
            table[2] = 2 * self.p
        return F.linear(x, table.T)


@pytest.mark.parametrize("kind", ["made anew", "a view"])
def test_parameters_written_into_constants(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Written(kind), nn.Linear(4, 2)).double()
    mtl = assert_exact(model, torch.randn(6, 4, dtype=torch.float64))
    assert in_slices(mtl) == ([] if kind == "made anew" else ["1"])


def test_a_buffer_that_parameters_are_written_into_stays_a_tensor():
    model = nn.Sequential(nn.Linear(4, 4), Written("kept"), nn.Linear(4, 2)).double()
    with pytest.raises(RuntimeError, match="inplace"):  # slices write to it one after the other
        assert_exact(model, torch.randn(6, 4, dtype=torch.float64))
    assert type(model[1].kept) is torch.Tensor


def _argument_of_a_checkpoint(m, x):
    return checkpoint(torch.mul, x, m.p, use_reentrant=True) @ m.q


def test_arguments_of_reentrant_checkpoints(options, device):
    """A checkpoint of this kind is a torch.autograd.Function itself."""
    model, plain = build(_argument_of_a_checkpoint, device), build(lambda m, x: x * m.p @ m.q, device)
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    assert_exact(model, x, plain=plain, options=options)


def _in_a_reentrant_checkpoint(m, x):
    return checkpoint(lambda y: Square.apply(y, m.p), x, use_reentrant=True) @ m.q


def _by_a_flag(m, x):
    return (Square.apply(x, m.p) if m.flag else x * m.p) @ m.q


@pytest.mark.parametrize("use", [_in_a_reentrant_checkpoint, _by_a_flag])
@pytest.mark.parametrize("way", ["grouped", "lean"])
def test_unseen_uses_that_no_check_finds_are_refused_by_name(use, way, device):
    model = build(use, device)
    mtl = dm.ClusteredMTL(model, K, Given(), **WAYS[way])
    x, cluster = torch.randn(6, 4, dtype=torch.float64, device=device), torch.tensor([2, 0, 2, 1, 0, 2])
    model[1].flag = False
    if use is _by_a_flag:
        mtl.backward(sample_losses(mtl(x, cluster=cluster)))
        model[1].flag = True
    with pytest.raises(RuntimeError, match=r"found a gradient of \['1.p'\] from one that they do not see"):
        mtl.backward(sample_losses(mtl(x, cluster=cluster)))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_are_refused_by_name(register, options, device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(device)
    called = []
    handle = getattr(model[1].weight, register)(called.append)
    mtl, plain = dm.ClusteredMTL(model, K, Given(), **options), dm.ClusteredMTL(model, K, dm.Equal())
    x, cluster = torch.randn(6, 4, device=device), torch.tensor([2, 0, 2, 1, 0, 2])
    with pytest.raises(ValueError, match=r"without gradient hooks, found some at \['1.weight'\]"):
        mtl(x, cluster=cluster)
    plain.backward(sample_losses(plain(x, cluster=cluster)))
    assert called
    handle.remove()
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))


def test_cached_parametrizations_are_refused(options, device):
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)).to(device)
    mtl = dm.ClusteredMTL(nn.Sequential(nn.Linear(4, 4), model).to(device), K, Given(), **options)
    with (
        parametrize.cached(),
        pytest.raises(RuntimeError, match=r"outside of torch.nn.utils.parametrize.cached"),
    ):
        mtl(torch.randn(6, 4, device=device), cluster=torch.tensor([2, 0, 2, 1, 0, 2]))


class Stashing(nn.Module):
    """Keeps its parameter in a list of its own, where no stand-in is found."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))
        self.all = [self.weight]

    def forward(self, x):
        return x @ self.all[0]


def test_parameters_kept_elsewhere_are_refused_by_name(options, device):
    mtl = dm.ClusteredMTL(nn.Sequential(nn.Linear(4, 4), Stashing()).to(device), K, Given(), **options)
    with pytest.raises(RuntimeError, match=r"found some in the .grad of \['1.weight'\]"):
        mtl(torch.randn(6, 4, device=device), cluster=torch.tensor([2, 0, 2, 1, 0, 2]))
