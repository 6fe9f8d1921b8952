"""Every built-in rule, and every way of using a parameter, against one torch.autograd.grad per cluster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import CLUSTERS, WAYS, assert_exact, in_slices
from torch import nn

from diffmtl_fast.gradients.cluster_jacobian import ClusterJacobian

B = 6


class Uses(nn.Module):
    """A model that uses its parameters by a given function."""

    def __init__(self, function, *shapes, **modules):
        super().__init__()
        self.function = function
        for name, shape in zip("pqr", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(0.5 + 0.5 * torch.rand(shape)))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def use(function, *shapes, x=(B, 4, 5), **modules):
    return lambda: (Uses(function, *shapes, **modules), torch.randn(x))


def layer(make, *shape, frozen=()):
    """A layer with some of its parameters frozen, between two layers whose gradients pass through it."""

    def build():
        module = make()
        for name in frozen:
            getattr(module, name).requires_grad_(False)
        return nn.Sequential(Scale(shape[-1]), module, Scale(1)), torch.randn(B, *shape)

    return build


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        return torch.tanh(x * self.factor)


def look_up(make, *shape):
    def build():
        return make(), torch.randint(0, 7, (B, *shape))

    return build


#: grouped without an exception: every parameter has a rule
RULES = {
    "linear": layer(lambda: nn.Linear(5, 3), 5),
    "linear 3-D": layer(lambda: nn.Linear(5, 3), 4, 5),
    "linear 4-D": layer(lambda: nn.Linear(5, 3), 2, 4, 5),
    "linear without bias": layer(lambda: nn.Linear(5, 3, bias=False), 4, 5),
    "linear, frozen weight": layer(lambda: nn.Linear(5, 3), 4, 5, frozen=["weight"]),
    "linear, frozen bias": layer(lambda: nn.Linear(5, 3), 4, 5, frozen=["bias"]),
    "linear of rows not in order": use(lambda m, x: m.p(x.transpose(1, 2)), p=nn.Linear(4, 3)),
    "matmul": use(lambda m, x: x @ m.p, (5, 3)),
    "matmul of a transpose": use(lambda m, x: torch.matmul(x, m.p.t()), (3, 5)),
    "linear by hand": use(lambda m, x: F.linear(x, weight=m.p, bias=m.q), (3, 5), (3,)),
    "conv1d": layer(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 4, 9),
    "conv1d dilated": layer(lambda: nn.Conv1d(4, 6, 3, dilation=2, groups=2, bias=False), 4, 9),
    "conv2d": layer(lambda: nn.Conv2d(2, 4, 3, padding=1), 2, 5, 6),
    "conv2d strided": layer(lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), 2, 5, 6),
    "conv2d dilated": layer(lambda: nn.Conv2d(2, 4, 3, dilation=(1, 2)), 2, 5, 6),
    "conv2d in groups": layer(lambda: nn.Conv2d(4, 4, 3, groups=4), 4, 5, 6),
    "conv2d same": layer(lambda: nn.Conv2d(2, 4, 3, padding="same"), 2, 5, 6),
    "conv2d valid": layer(lambda: nn.Conv2d(2, 4, (2, 3), padding="valid"), 2, 5, 6),
    "conv2d circular": layer(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), 2, 5, 6),
    "conv2d reflected": layer(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), 2, 5, 6),
    "conv2d 1x1": layer(lambda: nn.Conv2d(2, 4, 1), 2, 5, 6),
    "conv2d, frozen weight": layer(lambda: nn.Conv2d(2, 4, 3), 2, 5, 6, frozen=["weight"]),
    "conv2d, frozen bias": layer(lambda: nn.Conv2d(2, 4, 3), 2, 5, 6, frozen=["bias"]),
    "conv3d": layer(lambda: nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1), stride=(1, 2, 1)), 2, 3, 4, 5),
    "embedding": look_up(lambda: nn.Sequential(nn.Embedding(7, 5), nn.Tanh())),
    "embedding of many": look_up(lambda: nn.Sequential(nn.Embedding(7, 5), nn.Tanh()), 4, 2),
    "embedding padded": look_up(lambda: nn.Embedding(7, 5, padding_idx=2), 4),
    "embedding padded, from the end": look_up(lambda: nn.Embedding(7, 5, padding_idx=-3), 4),
    "layer_norm": layer(lambda: nn.LayerNorm(5), 4, 5),
    "layer_norm over two dimensions": layer(lambda: nn.LayerNorm((4, 5)), 2, 4, 5),
    "layer_norm without bias": layer(lambda: nn.LayerNorm(5, bias=False), 4, 5),
    "layer_norm without affine": layer(lambda: nn.LayerNorm(5, elementwise_affine=False), 4, 5),
    "layer_norm, frozen weight": layer(lambda: nn.LayerNorm(5), 4, 5, frozen=["weight"]),
    "layer_norm, frozen bias": layer(lambda: nn.LayerNorm(5), 4, 5, frozen=["bias"]),
    "group_norm": layer(lambda: nn.GroupNorm(2, 4), 4, 5),
    "group_norm of images": layer(lambda: nn.GroupNorm(2, 4), 4, 5, 3),
    "group_norm of one row": layer(lambda: nn.GroupNorm(2, 4), 4),
    "group_norm without affine": layer(lambda: nn.GroupNorm(2, 4, affine=False), 4, 5),
    "group_norm, frozen weight": layer(lambda: nn.GroupNorm(2, 4), 4, 5, frozen=["weight"]),
    "group_norm, frozen bias": layer(lambda: nn.GroupNorm(2, 4), 4, 5, frozen=["bias"]),
    "group_norm of a transpose": use(
        lambda m, x: m.norm(x.transpose(1, 3)), x=(B, 3, 5, 4), norm=nn.GroupNorm(2, 4)
    ),
    "rms_norm": layer(lambda: nn.RMSNorm(5), 4, 5),
    "rms_norm over two dimensions": layer(lambda: nn.RMSNorm((4, 5), eps=1e-3), 2, 4, 5),
    "rms_norm without affine": layer(lambda: nn.RMSNorm(5, elementwise_affine=False), 4, 5),
    "layer_norm of no tokens": use(
        lambda m, x: torch.cat([m.norm(x[:, :0]), m.norm(x)], 1), norm=nn.LayerNorm(5)
    ),
    "rms_norm of no tokens": use(
        lambda m, x: torch.cat([m.norm(x[:, :0]), m.norm(x)], 1), norm=nn.RMSNorm(5)
    ),
    # Raw parameters, element by element.
    "x + p": use(lambda m, x: x + m.p, (5,)),
    "p + x": use(lambda m, x: m.p + x, (5,)),
    "p - x": use(lambda m, x: m.p - x, (4, 5)),
    "x - p": use(lambda m, x: x - m.p, (1, 4, 1)),
    "p * x": use(lambda m, x: m.p * x, ()),
    "x / p": use(lambda m, x: x / m.p, (1, 5)),
    "p / x": use(lambda m, x: m.p / (2 + x.square()), (4, 1)),
    "x.mul(p)": use(lambda m, x: x.mul(m.p), (1,)),
    "sub with alpha": use(lambda m, x: torch.sub(x, m.p, alpha=3), (5,)),
    "rsub": use(lambda m, x: torch.rsub(x, m.p), (5,)),
    "addcmul": use(lambda m, x: torch.addcmul(m.p, x, m.q, value=2), (5,), (4, 1)),
    "lerp": use(lambda m, x: torch.lerp(x, m.p, m.q), (5,), ()),
    "lerp by scores": use(lambda m, x: torch.lerp(m.p, m.q, x.sigmoid()), (5,), ()),
    "where": use(lambda m, x: torch.where(x > 0, m.p, x * m.q), (5,), (4, 1)),
    "maximum": use(lambda m, x: torch.maximum(x, m.p), (5,)),
    "in place": use(lambda m, x: _in_place(x, m), (4, 5), (5,), ()),
    "one row wider than the batch": use(lambda m, x: x[:, :1] + m.p, (1, 4, 5)),
    "a batch of scalars": use(lambda m, x: (x.mean((1, 2)) * m.p)[:, None], ()),
    "layer scale": use(lambda m, x: x + m.p * m.lin(x), (5,), lin=nn.Linear(5, 5)),
    "scale-shift table": use(
        lambda m, x: _modulated(m.norm(x), (m.p[None] + m.lin(x.mean(1)).view(-1, 2, 5)).chunk(2, 1)),
        (2, 5),
        lin=nn.Linear(5, 10),
        norm=nn.LayerNorm(5, elementwise_affine=False),
    ),
    "table of all blocks": use(lambda m, x: _modulated(x, (m.p + x.mean(1, True)).chunk(2, 1)), (2, 5)),
    "positional embedding": use(lambda m, x: m.lin(x) + m.p[:, : x.shape[1]], (1, 9, 5), lin=nn.Linear(5, 5)),
    "embedding of positions": use(lambda m, x: x + m.p(torch.arange(4)), p=nn.Embedding(9, 5)),
    "class token": use(
        lambda m, x: m.lin(torch.cat([m.p.expand(len(x), -1, -1), x], 1)), (1, 1, 5), lin=nn.Linear(5, 3)
    ),
    "class token, after": use(lambda m, x: torch.cat([x, m.p.expand(len(x), 2, 5)], dim=-2), (5,)),
    "class token, repeated": use(lambda m, x: torch.cat((m.p.repeat(len(x), 1, 1), x), 1), (1, 2, 5)),
    "class token, broadcast": use(lambda m, x: torch.cat((torch.broadcast_to(m.p, x.shape), x), 1), (5,)),
    "class token, expanded as": use(lambda m, x: torch.cat((m.p.expand_as(x), x), 1), (1, 4, 5)),
    "queries": use(
        lambda m, x: F.scaled_dot_product_attention(m.lin(m.p.expand(len(x), -1, -1)), x, x),
        (1, 2, 5),
        lin=nn.Linear(5, 5),
    ),
    "mask token": use(lambda m, x: torch.where(x[..., :1] > 0, m.p, x), (1, 1, 5)),
    # Tensors computed from parameters.
    "cast": use(lambda m, x: x.float() @ m.p.float(), (5, 3)),
    "chunk": use(lambda m, x: _two_linears(x, *m.p.chunk(2)), (8, 5)),
    "split and reused": use(lambda m, x: _two_linears(x, *m.p.split([3, 4])) @ m.q.t()[:7], (7, 5), (3, 7)),
    "standardised": use(lambda m, x: F.conv1d(x, (m.p - m.p.mean()) / m.p.std()), (3, 4, 2)),
    "sum of two": use(lambda m, x: F.linear(F.linear(x, m.p + m.q), m.p + m.q), (5, 5), (5, 5)),
    "stack of two": use(lambda m, x: F.linear(x, torch.cat([m.p, m.q])), (2, 5), (3, 5)),
    "low rank": use(lambda m, x: x + F.linear(x, 0.5 * m.p @ m.q), (5, 2), (2, 5)),
    "softplus": use(lambda m, x: x * F.softplus(m.p), (5,)),
    "a norm of all": use(lambda m, x: x * m.p.norm(), (5, 3)),
    "weight_norm": use(lambda m, x: m.lin(x), lin=nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))),
    "weight_norm of a convolution": use(
        lambda m, x: m.conv(x), conv=nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 3, 2), dim=None)
    ),
    # Sharing.
    "tied": use(lambda m, x: F.linear(torch.tanh(F.linear(x, m.p)), m.p.t()), (3, 5)),
    "tied embedding": look_up(lambda: Uses(lambda m, x: m.p(x) @ m.p.weight.t(), p=nn.Embedding(7, 5)), 3),
    "weight and bias in one": use(lambda m, x: F.layer_norm(x, (5,), m.p, m.p), (5,)),
    "reused": use(lambda m, x: m.lin(torch.tanh(m.lin(x))) + m.lin(x * m.p), (5,), lin=nn.Linear(5, 5)),
    # Layouts.
    "rows folded": use(lambda m, x: m.p(x.flatten(0, 1)).view(-1, 4, 3), p=nn.Linear(5, 3)),
    "rows folded, convolved": use(
        lambda m, x: m.p(x.flatten(0, 1).unsqueeze(1)).view(-1, 4, 2, 4), p=nn.Conv1d(1, 2, 2)
    ),
    "parameters of several dtypes": use(lambda m, x: x * m.p + m.q.float(), (5,), (4, 1)),
}


def _in_place(x, model):
    x = x * model.r
    x += model.p
    x *= model.q
    x.sub_(model.q)
    return x.div_(model.p)


def _modulated(x, parts):
    shift, scale = parts
    return x * (1 + scale) + shift


def _two_linears(x, first, second):
    return torch.cat([F.linear(x, first), torch.tanh(F.linear(x, second))], -1)


def build(make):
    torch.manual_seed(0)
    model, x = make()
    return model.double(), x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_exact(name, way, device):
    rtol = 1e-9 if name not in ("cast", "parameters of several dtypes") else 1e-5
    model, x = build(RULES[name])
    clusters = list(CLUSTERS.values())
    mtl = assert_exact(model.to(device), x.to(device), cluster=clusters, rtol=rtol, options=WAYS[way])
    assert in_slices(mtl) == (None if way == "sliced" else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in RULES if name.startswith("conv")])
def test_convolutions_of_clusters_of_one_size(name, dtype, device):
    model, x = build(RULES[name])
    model, x, rtol = model.to(device, dtype), x.to(device, dtype), 1e-9 if dtype == torch.float64 else 1e-5
    mtl = assert_exact(model, x, cluster=[0, 0, 1, 1, 2, 2], rtol=rtol, steps=1)
    assert in_slices(mtl) == []


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("weight", [None, torch.float32], ids=["weight alike", "weight in float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_without_an_epsilon_takes_that_of_pytorch(dtype, weight, device):
    torch.manual_seed(0)
    model = nn.RMSNorm(6).to(device, weight or dtype)
    # Their squares are below the epsilon of these numbers.
    x = (1e-2 * torch.randn(4, 6, device=device)).to(dtype)
    target, cluster = torch.randn(4, 6, device=device), torch.tensor([0, 0, 1, 1], device=device)
    (model(x).float() * target).mean().backward()
    expected, model.weight.grad = model.weight.grad, None
    jacobian = ClusterJacobian(model, 2, engine="grouped")
    jacobian(lambda module: (module(x).float() * target).mean(1), cluster)
    torch.testing.assert_close(jacobian.matrix().mean(0).to(expected.dtype), expected, rtol=2e-2, atol=1e-3)
