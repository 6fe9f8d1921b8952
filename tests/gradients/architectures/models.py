"""Small models as they are trained: adapters, modulation, transformers, U-nets, experts, hypernetworks, video."""

from __future__ import annotations

import functools
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import BY_NAME, NO_RULE, OTHER_ROWS, Family, chain, indices, rows, written

add = Family("models")
CASES = add.cases

linear = functools.partial(nn.Linear, 4, 5)
square = functools.partial(nn.Linear, 4, 4)


# Adapters; `base` is frozen.
def base():
    return nn.Linear(4, 5).requires_grad_(False)


add(
    "lora",
    written(
        lambda m, x: m.base(x) + m.up(m.down(x)),
        base=base,
        down=lambda: nn.Linear(4, 2, bias=False),
        up=lambda: nn.Linear(2, 5, bias=False),
    ),
    rows(3, 4),
)
add(
    "lora-merged",
    written(
        lambda m, x: F.linear(x, m.base.weight + 2 * m.up @ m.down, m.base.bias),
        base=base,
        down=(2, 4),
        up=(5, 2),
    ),
    rows(3, 4),
)
add(
    "dora",
    written(
        lambda m, x: F.linear(x, m.scale * F.normalize(m.base.weight + m.up @ m.down, dim=1), m.base.bias),
        base=base,
        down=(2, 4),
        up=(5, 2),
        scale=(5, 1),
    ),
    rows(3, 4),
)
add(
    "dora-detached-norm",
    written(lambda m, x: _dora(m, x), base=base, down=(2, 4), up=(5, 2), scale=(5, 1)),
    rows(3, 4),
)
add(
    "loha",
    written(
        lambda m, x: F.linear(x, m.base.weight + (m.a @ m.b) * (m.c @ m.d)),
        base=base,
        a=(5, 2),
        b=(2, 4),
        c=(5, 2),
        d=(2, 4),
    ),
    rows(3, 4),
)
add(
    "lokr",
    written(
        lambda m, x: F.linear(x, m.base.weight + torch.kron(m.a, m.b @ m.c)),
        base=lambda: square().requires_grad_(False),
        a=(2, 2),
        b=(2, 1),
        c=(1, 2),
    ),
    rows(3, 4),
)
add("ia3", written(lambda m, x: m.base(x * m.a) * m.b, base=base, a=(4,), b=(5,)), rows(3, 4))
add(
    "lora-convolution",
    written(
        lambda m, x: m.base(x) + m.up(m.down(x)),
        base=lambda: nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False),
        down=lambda: nn.Conv2d(3, 2, 3, padding=1, bias=False),
        up=lambda: nn.Conv2d(2, 4, 1, bias=False),
    ),
    rows(3, 5, 5),
)
add(
    "vera",
    written(
        lambda m, x: m.base(x) + F.linear(F.linear(x, m.a * m.d[:, None]), m.b * m.e[:, None]),
        base=base,
        a=torch.ones(2, 4) / 3,
        b=torch.ones(5, 2) / 3,
        d=(2,),
        e=(5,),
    ),
    rows(3, 4),
)
add("bitfit", written(lambda m, x: F.linear(x, m.base.weight, m.bias), base=base, bias=(5,)), rows(3, 4))
add(
    "textual-inversion",
    written(
        lambda m, t: m.head(torch.where((t == 0)[..., None], m.token, m.table(t))),
        table=lambda: nn.Embedding(7, 4).requires_grad_(False),
        token=(4,),
        head=linear,
    ),
    indices(7, 3),
)
add(
    "prefix-tuning",
    written(
        lambda m, x: F.scaled_dot_product_attention(
            m.q(x),
            torch.cat([m.key.expand(len(x), -1, -1), m.k(x)], 1),
            torch.cat([m.value.expand(len(x), -1, -1), x], 1),
        ),
        q=square,
        k=square,
        key=(2, 4),
        value=(2, 4),
    ),
    rows(3, 4),
)


def _dora(m, x):
    weight = m.base.weight + m.up @ m.down
    return F.linear(x, m.scale * weight / weight.norm(dim=1, keepdim=True).detach(), m.base.bias)


# Modulation.
add(
    "film",
    written(
        lambda m, x, c: (lambda s, b: m.norm(x) * (1 + s) + b)(*m.modulation(c)[:, None].chunk(2, -1)),
        norm=lambda: nn.LayerNorm(4, elementwise_affine=False),
        modulation=lambda: nn.Linear(3, 8),
    ),
    rows(3, 4),
    rows(3),
)
add(
    "film-of-images",
    written(
        lambda m, x, c: m.conv(x) * m.scale(c)[:, :, None, None] + m.shift(c)[..., None, None],
        conv=lambda: nn.Conv2d(3, 4, 3),
        scale=lambda: nn.Linear(3, 4),
        shift=lambda: nn.Linear(3, 4),
    ),
    rows(3, 5, 5),
    rows(3),
)
add(
    "scale-shift-table",
    written(
        lambda m, x, c: (lambda s, b: x * (1 + s) + b)(
            *(m.table[None] + m.modulation(c).view(-1, 2, 4)).unsqueeze(2).unbind(1)
        ),
        table=(2, 4),
        modulation=lambda: nn.Linear(3, 8),
    ),
    rows(3, 4),
    rows(3),
)
add(
    "squeeze-and-excitation",
    written(
        lambda m, x: m.conv(x) * m.gate(m.conv(x).mean((2, 3))).sigmoid()[..., None, None],
        conv=lambda: nn.Conv2d(3, 4, 1),
        gate=square,
    ),
    rows(3, 4, 4),
)
add("layer-scale", written(lambda m, x: x + m.gamma * m.inner(x), gamma=(4,), inner=square), rows(3, 4))
add(
    "highway",
    written(lambda m, x: torch.lerp(x, m.inner(x), m.gate(x).sigmoid()), inner=square, gate=square),
    rows(4),
)
add(
    "learned-temperature",
    written(lambda m, x: (m.q(x) @ x.mT * m.t.exp()).softmax(-1) @ x, q=square, t=()),
    rows(3, 4),
)
add(
    "gaussian-fourier-features",
    written(
        lambda m, t: m.out(torch.cat([(t @ m.w).sin(), (t @ m.w).cos()], -1)),
        w=(1, 4),
        out=lambda: nn.Linear(8, 3),
    ),
    rows(1),
)


class Block(nn.Module):
    """A transformer block with adaptive normalisation."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        a, b, g, d, e, h = self.modulation(F.silu(c))[:, None].chunk(6, -1)
        q, k, v = (
            self.qkv(self.norm1(x) * (1 + a) + b)
            .view(len(x), -1, 3, 2, x.shape[-1] // 2)
            .permute(2, 0, 3, 1, 4)
        )
        x = x + g * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + h * self.mlp(self.norm2(x) * (1 + d) + e)


class Transformer(nn.Module):
    """A small diffusion transformer."""

    def __init__(self, width=8):
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, width, 2, 2), nn.Parameter(torch.randn(1, 4, width))
        self.time, self.label = nn.Embedding(10, width), nn.Embedding(4, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.head = nn.Linear(width, 12)

    def forward(self, x, t, label=None):
        h = self.patch(x).flatten(2).mT + self.position
        c = self.time(t) + (0 if label is None else self.label(label))
        for block in self.blocks:
            h = block(h, c)
        h = self.head(h).view(len(x), 2, 2, 2, 2, 3)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 3, 4, 4)


class UNet(nn.Module):
    """A small U-net with a skip connection and time embedding."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.SiLU())
        self.enter, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.norm, self.middle = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.leave = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, t):
        skip = F.silu(self.enter(x))
        h = self.down(skip) + self.time(t)[:, :, None, None]
        h = h + self.middle(F.silu(self.norm(h)))
        return self.leave(torch.cat([skip, self.up(F.interpolate(h, scale_factor=2))], 1))


add("dit", Transformer, rows(3, 4, 4), indices(10), floats=("float64", "float32", "bfloat16"))
add("dit-with-labels", Transformer, rows(3, 4, 4), indices(10), kwargs={"label": indices(4)})
add("dit-frozen-blocks", lambda: _freeze(Transformer(), "blocks"), rows(3, 4, 4), indices(10))
add("unet", UNet, rows(3, 4, 4), indices(10), floats=("float64", "float32", "bfloat16"))
add(
    "unet-channels-last",
    lambda: UNet().to(memory_format=torch.channels_last),
    lambda size: torch.randn(size, 3, 4, 4).to(memory_format=torch.channels_last),
    indices(10),
)
add("unet-frozen-encoder", lambda: _freeze(UNet(), "enter"), rows(3, 4, 4), indices(10))
add(
    "residual-mlp",
    written(
        lambda m, x: functools.reduce(lambda h, f: h + f(h), m.blocks, x),
        blocks=lambda: nn.ModuleList(
            [chain(lambda: nn.LayerNorm(4), square, nn.GELU, square)() for _ in range(3)]
        ),
    ),
    rows(4),
)
add(
    "autoencoder",
    chain(lambda: nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU, lambda: nn.ConvTranspose2d(4, 3, 4, 2, 1)),
    rows(3, 4, 4),
)
add(
    "vae",
    written(
        lambda m, x: m.decode((lambda mu, s: mu + s.exp() * torch.ones_like(mu))(*m.encode(x).chunk(2, -1))),
        encode=lambda: nn.Linear(4, 6),
        decode=lambda: nn.Linear(3, 4),
    ),
    rows(4),
)
add(
    "mlp-mixer",
    written(lambda m, x: m.channels(m.tokens(x.mT).mT), tokens=lambda: nn.Linear(3, 3), channels=square),
    rows(3, 4),
)
add(
    "siamese",
    written(lambda m, x, y: F.cosine_similarity(m.inner(x), m.inner(y))[:, None], inner=linear),
    rows(4),
    rows(4),
)
add(
    "multi-head-output",
    written(
        lambda m, x: torch.cat([h(x) for h in m.heads], 1),
        heads=lambda: nn.ModuleList([nn.Linear(4, n) for n in (1, 2, 3)]),
    ),
    rows(4),
)


def _freeze(model, name):
    model.get_submodule(name).requires_grad_(False)
    return model


# Experts and hypernetworks.
def _routed(m, x, t):
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        chosen = t == i
        out[chosen] = expert(x[chosen])
    return out


def _routed_by_index(m, x, t):
    parts = [(torch.nonzero(t == i)[:, 0], e) for i, e in enumerate(m.experts)]
    return sum(torch.zeros_like(x).index_add(0, rows, e(x[rows])) for rows, e in parts)


def experts():
    return nn.ModuleList([square() for _ in range(3)])


add(
    "soft-experts",
    written(
        lambda m, x: sum(
            g[:, None] * e(x) for g, e in zip(m.gate(x).softmax(-1).unbind(-1), m.experts, strict=True)
        ),
        gate=lambda: nn.Linear(4, 3),
        experts=experts,
    ),
    rows(4),
)
add(
    "masked-experts",
    written(lambda m, x, t: sum((t == i)[:, None] * e(x) for i, e in enumerate(m.experts)), experts=experts),
    rows(4),
    indices(3),
)
add("routed-experts", written(_routed, experts=experts), rows(4), indices(3), slices=OTHER_ROWS)
add(
    "routed-experts-second",
    written(lambda m, x, t: _routed(m, m.first(x), t), first=square, experts=experts),
    rows(4),
    indices(3),
    slices=OTHER_ROWS,
)
add(
    "routed-experts-by-index",
    written(_routed_by_index, experts=experts),
    rows(4),
    indices(3),
    slices=OTHER_ROWS,
)
add(
    "stacked-experts",
    written(lambda m, x, t: torch.einsum("bi,bio->bo", x, m.w[t]) + m.b[t], w=(3, 4, 5), b=(3, 5)),
    rows(4),
    indices(3),
    slices=NO_RULE,
)
add(
    "expert-by-embedding",
    written(
        lambda m, x, t: (x[:, None] @ m.table(t).view(-1, 4, 5))[:, 0], table=lambda: nn.Embedding(3, 20)
    ),
    rows(4),
    indices(3),
)
add(
    "hypernetwork",
    written(lambda m, x, c: (x[:, None] @ m.hyper(c).view(-1, 4, 5))[:, 0], hyper=lambda: nn.Linear(3, 20)),
    rows(4),
    rows(3),
)
add(
    "hypernetwork-of-parameters",
    written(lambda m, x: F.linear(x, m.hyper(m.code).view(5, 4)), hyper=lambda: nn.Linear(3, 20), code=(3,)),
    rows(4),
)
add(
    "hypernetwork-convolution",
    written(
        lambda m, x, c: F.conv2d(
            x.flatten(0, 1)[None], m.hyper(c).view(-1, 1, 3, 3), groups=x.shape[0] * x.shape[1]
        ).view(len(x), 3, 3, 3),
        hyper=lambda: nn.Linear(2, 27),
    ),
    rows(3, 5, 5),
    rows(2),
    slices=BY_NAME,
)
add(
    "codebook",
    written(
        lambda m, x: (lambda i: m.table(i) * x)(torch.cdist(x, m.table.weight.detach()).argmin(1)),
        table=lambda: nn.Embedding(7, 4),
    ),
    rows(4),
)
add(
    "codebook-straight-through",
    written(
        lambda m, x: (lambda z: m.out(z + (m.table(torch.cdist(z, m.table.weight).argmin(1)) - z).detach()))(
            m.inner(x)
        ),
        inner=square,
        table=lambda: nn.Embedding(7, 4),
        out=linear,
    ),
    rows(4),
    slices=NO_RULE,
)
add(
    "neural-ode",
    written(
        lambda m, x: functools.reduce(lambda h, _: h + 0.1 * m.inner(h).tanh(), range(6), x), inner=square
    ),
    rows(4),
)
add(
    "fixed-point",
    written(
        lambda m, x: functools.reduce(lambda h, _: torch.tanh(m.inner(h) + x), range(8), torch.zeros_like(x)),
        inner=square,
    ),
    rows(4),
)
add(
    "self-conditioning",
    written(
        lambda m, x: m.inner(torch.cat([x, m.inner(torch.cat([x, torch.zeros_like(x)], 1)).detach()], 1)),
        inner=lambda: nn.Linear(8, 4),
    ),
    rows(4),
)

# Rows that are more than samples, or lie elsewhere.
add(
    "tokens-in-the-batch",
    written(lambda m, x: m.inner(x.flatten(0, 1)).view(len(x), -1, 5), inner=linear),
    rows(3, 4),
)
add(
    "tokens-in-the-batch-first-of-two",
    written(
        lambda m, x: m.last(m.inner(x.reshape(-1, 4)).tanh().view(len(x), -1)),
        inner=linear,
        last=lambda: nn.Linear(15, 2),
    ),
    rows(3, 4),
)
add(
    "token-major",
    written(
        lambda m, x: m.inner(x.transpose(0, 1).reshape(-1, 4)).view(3, len(x), 5).transpose(0, 1),
        inner=linear,
    ),
    rows(3, 4),
    slices=OTHER_ROWS,
)
add(
    "batch-second",
    written(lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=linear),
    rows(3, 4),
    slices=OTHER_ROWS,
)
add(
    "batch-last",
    written(lambda m, x: torch.movedim(m.inner(torch.movedim(x, 0, -2)), -2, 0), inner=linear),
    rows(3, 2, 4),
    slices=OTHER_ROWS,
)
add(
    "guidance-doubled",
    written(
        lambda m, x: (lambda a, b: a + 2 * (b - a))(*m.inner(torch.cat([x, x.sin()])).chunk(2)), inner=linear
    ),
    rows(4),
    slices=OTHER_ROWS,
)
add(
    "guidance-repeated",
    written(lambda m, x: m.inner(x.repeat_interleave(2, 0)).view(len(x), 2, 5).mean(1), inner=linear),
    rows(4),
)
add(
    "video-frames",
    written(lambda m, x: m.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]), conv=lambda: nn.Conv2d(3, 4, 3)),
    rows(2, 3, 4, 4),
)
add(
    "video-time-attention",
    written(
        lambda m, x: (lambda h: F.scaled_dot_product_attention(m.q(h), m.k(h), h).unflatten(0, (len(x), 5)))(
            x.transpose(1, 2).flatten(0, 1)
        ),
        q=square,
        k=square,
    ),
    rows(3, 5, 4),
)
add(
    "video-convolution-in-time",
    written(
        lambda m, x: m.conv(x.permute(0, 3, 2, 1).flatten(0, 1)).unflatten(0, (len(x), 5)),
        conv=lambda: nn.Conv1d(4, 3, 1),
    ),
    rows(2, 4, 5),
)
add(
    "windows",
    written(
        lambda m, x: m.inner(x.unfold(1, 2, 2).flatten(0, 1)).view(len(x), -1, 5),
        inner=lambda: nn.Linear(2, 5),
    ),
    rows(6),
)
add(
    "permuted-channels",
    written(lambda m, x: m.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), inner=linear),
    rows(4, 3, 3),
)
add(
    "stacked-models-outputs",
    written(
        lambda m, x: torch.stack([f(x) for f in m.parts], 1),
        parts=lambda: nn.ModuleList([linear() for _ in range(3)]),
    ),
    rows(4),
)

# Arguments and outputs.
Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    """An output of a model."""

    sample: Tensor
    scale: float = 1.0


add(
    "tuple",
    written(lambda m, x: (m.a(x), m.b(x)), a=linear, b=square),
    rows(4),
    output=lambda out: torch.cat(out, 1),
)
add(
    "one-of-a-tuple",
    written(lambda m, x: (m.a(x), m.b(x)), a=linear, b=square),
    rows(4),
    output=lambda out: out[0],
)
add(
    "list",
    written(lambda m, x: [m.a(x), m.b(x)], a=linear, b=square),
    rows(4),
    output=lambda out: torch.cat(out, 1),
)
add(
    "dictionary",
    written(lambda m, x: {"a": m.a(x), "b": m.b(x)}, a=linear, b=square),
    rows(4),
    output=lambda out: out["a"],
)
add(
    "named-tuple",
    written(lambda m, x: Pair(m.a(x), m.b(x)), a=linear, b=square),
    rows(4),
    output=lambda out: out.right,
)
add("dataclass", written(lambda m, x: Output(m.a(x)), a=linear), rows(4), output=lambda out: out.sample)
add(
    "nested",
    written(lambda m, x: {"a": [m.a(x), None, (m.b(x), 3)]}, a=linear, b=square),
    rows(4),
    output=lambda out: out["a"][2][0],
)
add(
    "keywords",
    written(lambda m, x, *, y, scale=1.0: scale * m.a(x) + m.a(y), a=linear),
    rows(4),
    kwargs={"y": rows(4), "scale": lambda size: 2.0},
)
add(
    "dictionary-argument",
    written(lambda m, given: m.a(given["x"]) + m.a(given["y"]), a=linear),
    lambda size: {"x": torch.randn(size, 4), "y": torch.randn(size, 4)},
)
add(
    "none-argument",
    written(lambda m, x, c: m.a(x) if c is None else m.a(x) + c, a=linear),
    rows(4),
    lambda size: None,
)
add(
    "boolean-argument",
    written(lambda m, x, flag: m.a(x) if flag else m.b(x), a=linear, b=linear),
    rows(4),
    lambda size: True,
)
add("scalar-argument", written(lambda m, x, s: m.a(x) * s, a=linear), rows(4), lambda size: torch.tensor(0.7))
add(
    "integer-input",
    written(lambda m, t: m.a(t[:, None].to(m.a.weight.dtype) / 7), a=lambda: nn.Linear(1, 5)),
    indices(7),
)
add(
    "whole-batch-argument-of-other-length",
    written(lambda m, x, s: m.a(x) * s.sum(), a=linear),
    rows(4),
    lambda size: torch.linspace(0, 1, 5),
)
add(
    "input-with-gradient",
    written(lambda m, x: m.a(x), a=linear),
    lambda size: torch.randn(size, 4).requires_grad_(),
)
