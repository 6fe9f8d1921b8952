"""What Python lets a model do: autograd functions, scripts, checkpoints, writes, gradients inside the forward."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from .case import BY_NAME, NO_RULE, Family, chain, indices, rows, written

add = Family("adversarial")
CASES = add.cases

linear = functools.partial(nn.Linear, 4, 5)
square = functools.partial(nn.Linear, 4, 4)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum_to_size(w.shape)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return 2 * w

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


@torch.jit.script
def scripted_scale(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * w)


# Functions that no tensor subclass sees; those of parameters alone are shown to the engine.
add("autograd-function", written(lambda m, x: Scale.apply(x, m.w).sin(), w=(4,)), rows(4), slices=NO_RULE)
add(
    "autograd-function-after-linear",
    written(lambda m, x: Scale.apply(m.inner(x), m.w).sin(), inner=linear, w=(5,)),
    rows(4),
    slices=NO_RULE,
)
add(
    "autograd-function-of-a-parameter",
    written(lambda m, x: F.linear(x, Twice.apply(m.w)), w=(5, 4)),
    rows(4),
)
add(
    "straight-through",
    written(lambda m, x: F.linear(x, Straight.apply(m.w)), w=(5, 4)),
    rows(4),
)
add(
    "straight-through-by-detach",
    written(lambda m, x: F.linear(x, m.w + (m.w.sign() - m.w).detach()), w=(5, 4)),
    rows(4),
)
add(
    "autograd-function-raw-and-seen",
    written(lambda m, x: Scale.apply(x * m.w, m.w), w=(4,)),
    rows(4),
    slices=NO_RULE,
)
add(
    "autograd-function-in-a-child",
    chain(square, written(lambda m, x: Scale.apply(x, m.w), w=(4,)), nn.Tanh, square),
    rows(4),
)
add("scripted-function", written(lambda m, x: scripted_scale(x, m.w), w=(4,)), rows(4), slices=NO_RULE)
add(
    "scripted-module",
    lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))),
    rows(4),
    slices=BY_NAME,
)
add(
    "scripted-child",
    chain(square, lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), square),
    rows(4),
    slices=BY_NAME,
)
add(
    "scripted-child-first",
    chain(lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), square),
    rows(4),
    slices=BY_NAME,
)
add(
    "traced-child",
    chain(
        square, lambda: torch.jit.trace(nn.Linear(4, 4).double(), torch.randn(6, 4).double()).float(), nn.Tanh
    ),
    rows(4),
    slices=BY_NAME,
)

# Function transforms.
add("vmap-of-a-module", written(lambda m, x: torch.vmap(m.inner)(x), inner=linear), rows(4), slices=BY_NAME)
add(
    "vmap-of-a-child",
    chain(square, nn.Tanh, written(lambda m, x: torch.vmap(m.inner)(x), inner=linear)),
    rows(3, 4),
    slices=BY_NAME,
)
add(
    "vmap-over-tokens",
    written(lambda m, x: torch.vmap(m.inner, in_dims=1, out_dims=1)(x), inner=linear),
    rows(3, 4),
    slices=BY_NAME,
)
add(
    "vmap-of-a-function",
    written(lambda m, x: torch.vmap(lambda r: torch.tanh(r @ m.w))(x), w=(4, 5)),
    rows(4),
    slices=BY_NAME,
)
add(
    "vmap-over-parameters",
    written(lambda m, x: torch.vmap(lambda w: x @ w, out_dims=1)(m.w), w=(3, 4, 5)),
    rows(4),
    slices=NO_RULE,
)
add(
    "functional-call",
    written(
        lambda m, x: torch.func.functional_call(m.inner, dict(m.inner.named_parameters()), (x,)), inner=linear
    ),
    rows(4),
)
add(
    "functional-call-scaled",
    written(
        lambda m, x: torch.func.functional_call(
            m.inner, {n: 2 * p for n, p in m.inner.named_parameters()}, (x,)
        ),
        inner=linear,
    ),
    rows(4),
)
add(
    "jvp",
    written(
        lambda m, x: torch.func.jvp(lambda v: m.inner(v).tanh(), (x,), (torch.ones_like(x),))[1], inner=linear
    ),
    rows(4),
    slices=BY_NAME,
)
add(
    "jacrev-per-sample",
    written(lambda m, x: torch.vmap(torch.func.jacrev(lambda v: (v @ m.w).tanh().sum()))(x), w=(4, 5)),
    rows(4),
    slices=BY_NAME,
)


# Gradients formed inside the forward.
def _energy(m, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = m.last(torch.tanh(m.first(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def _raw_energy(m, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad((torch.tanh(x * m.w) * m.v).sum(), x, create_graph=True)[0]


def _penalised(m, x):
    x = x.detach().requires_grad_()
    out = m.last(torch.tanh(m.first(x)))
    slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
    return torch.cat([out, slope.square().sum(1, keepdim=True)], 1)


def _guided(m, x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        guide = torch.autograd.grad(m.guide(y).tanh().sum(), y)[0]
    return m.inner(x + guide)


parts = {"first": square, "last": lambda: nn.Linear(4, 1)}
add("score-of-an-energy", written(_energy, **parts), rows(4), slices=BY_NAME)
add("score-of-a-raw-energy", written(_raw_energy, w=(4,), v=(4,)), rows(4), slices=BY_NAME)
add(
    "score-of-an-energy-in-a-child", chain(square, written(_energy, **parts), square), rows(4), slices=BY_NAME
)
add("gradient-penalty", written(_penalised, **parts), rows(4), slices=BY_NAME)
add(
    "guidance-without-graph",
    written(_guided, guide=lambda: nn.Linear(4, 1), inner=linear),
    rows(4),
    slices=BY_NAME,
)
add(
    "hook-on-an-activation",
    written(lambda m, x: _hooked(m.inner(x)).sin() * m.w, inner=linear, w=(5,)),
    rows(4),
)


def _hooked(h):
    h.register_hook(lambda grad: 2 * grad)
    return h


add("detached-branch", written(lambda m, x: m.inner(x) * m.inner(x).detach(), inner=linear), rows(4))
add(
    "no-grad-branch",
    written(lambda m, x: m.inner(x) * _without(m.other, x), inner=linear, other=linear),
    rows(4),
)
add(
    "inference-of-itself",
    written(
        lambda m, x: m.inner(x + _without(m.back, m.inner(x))), inner=linear, back=lambda: nn.Linear(5, 4)
    ),
    rows(4),
)


def _without(module, x):
    with torch.no_grad():
        return module(x)


# Checkpoints.
block = chain(square, nn.Tanh, square)


def _not_reentrant(model):
    model.reentrant = False


for reentrant in (False, True):
    word = "reentrant" if reentrant else "plain"
    expected = (
        {"whole": "use_reentrant", "slices": "use_reentrant", "plain": _not_reentrant} if reentrant else {}
    )
    add(
        f"checkpoint-{word}",
        written(
            lambda m, x: m.last(checkpoint(m.block, m.first(x), use_reentrant=m.reentrant)),
            reentrant=reentrant,
            first=square,
            block=block,
            last=linear,
        ),
        rows(4),
        **expected,
    )
    add(
        f"checkpoint-{word}-of-raw",
        written(
            lambda m, x: checkpoint(lambda h: (h * m.w).sin(), m.first(x), use_reentrant=m.reentrant),
            reentrant=reentrant,
            first=square,
            w=(4,),
        ),
        rows(4),
        **expected,
    )
add(
    "checkpoint-nested",
    written(
        lambda m, x: checkpoint(
            lambda h: m.last(checkpoint(m.block, h, use_reentrant=False)), m.first(x), use_reentrant=False
        ),
        first=square,
        block=block,
        last=linear,
    ),
    rows(4),
)
add(
    "checkpoint-first",
    written(lambda m, x: checkpoint(m.block, x, use_reentrant=False), block=block),
    rows(4),
)
add(
    "checkpoint-of-a-recurrence",
    written(
        lambda m, x: checkpoint(lambda h: m.cell(h)[0], x, use_reentrant=False),
        cell=lambda: nn.GRU(4, 5, batch_first=True),
    ),
    rows(3, 4),
)


# Writes of a model to itself.
def _forced(m, x):
    if m.training:
        with torch.no_grad():
            m.w.copy_(F.normalize(m.w, dim=1))
    return F.linear(x, m.w / 2)


def _forced_raw(m, x):
    if m.training:
        with torch.no_grad():
            m.w.copy_(F.normalize(m.w, dim=1))
    return F.linear(x, m.w)


class Forced(nn.Module):
    """A linear layer that puts its weight's rows back to length 1 in every forward."""

    def __init__(self, width, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(F.normalize(self.weight, dim=1))
        weight = F.normalize(self.weight, dim=1) / self.weight.shape[1] ** 0.5
        return F.linear(x, weight)


def _clamped(m, x):
    m.w.data.clamp_(-1, 1)
    return x * m.w


def _counted(m, x):
    m.count += 1
    return m.inner(x)


def _averaged(m, x):
    h = m.inner(x)
    if m.training:
        with torch.no_grad():
            m.mean.lerp_(h.mean(0), 0.1)
    return h


def _drifting(m, x):
    m.drift.mul_(1.5)
    return m.inner(x) * m.drift


add("forced-normalisation", written(_forced, w=(5, 4)), rows(4), sizes=(6, 6, 6))
add("forced-normalisation-raw", written(_forced_raw, w=(5, 4)), rows(4), sizes=(6, 6, 6))
add(
    "forced-normalisation-chain",
    chain(lambda: Forced(4, 5), nn.SiLU, lambda: Forced(5, 4)),
    rows(4),
    sizes=(6, 6, 6),
)
add(
    "forced-normalisation-eval",
    lambda: chain(lambda: Forced(4, 5), nn.SiLU, lambda: Forced(5, 4))().eval(),
    rows(4),
)
add("clamped-data", written(_clamped, w=(4,)), rows(4))
add(
    "spectral-norm",
    chain(lambda: parametrizations.spectral_norm(linear()), nn.Tanh, lambda: nn.Linear(5, 3)),
    rows(4),
    whole="'_u'",
)
add(
    "spectral-norm-eval",
    lambda: chain(
        lambda: parametrizations.spectral_norm(linear()), nn.Tanh, lambda: nn.Linear(5, 3)
    )().eval(),
    rows(4),
)
add(
    "old-spectral-norm-eval",
    lambda: chain(lambda: nn.utils.spectral_norm(linear()), nn.Tanh)().eval(),
    rows(4),
)
add("counted-calls", written(_counted, inner=linear, count=torch.zeros(())), rows(4), whole="count")
add("running-mean", written(_averaged, inner=linear, mean=torch.zeros(5)), rows(4), whole="mean")
add(
    "drifting-buffer-in-eval",
    lambda: written(_drifting, inner=linear, drift=torch.ones(5))().eval(),
    rows(4),
    whole="drift",
)
add("drifting-buffer", written(_drifting, inner=linear, drift=torch.ones(5)), rows(4), whole="drift")


# Parametrisations.
class Skew(nn.Module):
    def forward(self, w):
        return w.triu(1) - w.triu(1).mT


for name, layer in {
    "weight-norm": lambda: parametrizations.weight_norm(linear()),
    "old-weight-norm": lambda: nn.utils.weight_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(square(), use_trivialization=False),
    "orthogonal-cayley": lambda: parametrizations.orthogonal(
        square(), orthogonal_map="cayley", use_trivialization=False
    ),
    "skew": lambda: _parametrized(square(), Skew()),
    "two-parametrizations": lambda: _parametrized(_parametrized(square(), Skew()), nn.Tanh()),
}.items():
    add(name, chain(layer, nn.Tanh), rows(4))
    add(f"{name}-second", chain(square, nn.Tanh, layer), rows(4))
add("weight-norm-convolution", chain(lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), rows(3, 5, 5))


def _parametrized(module, parametrization):
    parametrize.register_parametrization(module, "weight", parametrization)
    return module


# Members and structure.
def _tied():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    return model


def _tied_blocks():
    model = nn.Sequential(square(), nn.Tanh(), square(), nn.Tanh(), square())
    model[4].weight, model[2].bias = model[0].weight, model[0].bias
    return model


def _frozen(*names):
    def build():
        model = nn.Sequential(square(), nn.Tanh(), square(), nn.Tanh(), linear())
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return build


add("tied", _tied, indices(7, 3))
add("tied-blocks", _tied_blocks, rows(4))
add(
    "tied-transposed",
    written(lambda m, x: F.linear(m.inner(x).sin(), m.inner.weight.T), inner=linear),
    rows(4),
)
add("reused-module", written(lambda m, x: m.inner(m.inner(m.inner(x).sin()).sin()), inner=square), rows(4))
add(
    "reused-in-a-loop",
    written(lambda m, x: functools.reduce(lambda h, _: m.inner(h).tanh(), range(5), x), inner=square),
    rows(4),
)
add(
    "reused-at-two-lengths",
    written(lambda m, x: torch.cat([m.inner(x), m.inner(x[:, :1])], 1), inner=linear),
    rows(3, 4),
)
add(
    "reused-at-two-ranks",
    written(lambda m, x: m.inner(x) + m.inner(x.mean(1))[:, None], inner=linear),
    rows(3, 4),
)
add("frozen-weight", _frozen("0.weight"), rows(4))
add("frozen-first", _frozen("0.weight", "0.bias"), rows(4))
add("frozen-biases", _frozen("0.bias", "2.bias", "4.bias"), rows(4))
add("only-the-last-bias", _frozen("0.weight", "0.bias", "2.weight", "2.bias", "4.weight"), rows(4))
add("unused-module", written(lambda m, x: m.inner(x), inner=linear, other=square), rows(4))
add("unused-parameter", written(lambda m, x: m.inner(x), inner=linear, w=(3,)), rows(4))
add(
    "frozen-branch",
    written(lambda m, x: m.inner(x) + m.other(x), inner=linear, other=lambda: linear().requires_grad_(False)),
    rows(4),
)
add("times-zero", written(lambda m, x: m.inner(x) + 0 * m.w, inner=linear, w=(5,)), rows(4))
add("empty-parameter", written(lambda m, x: m.inner(x) + m.w.sum(), inner=linear, w=(0,)), rows(4))
add(
    "no-outputs",
    written(lambda m, x: torch.cat([x * m.w, m.inner(x)], 1), inner=lambda: nn.Linear(4, 0), w=(4,)),
    rows(4),
)
add("no-inputs", written(lambda m, x: m.inner(x[:, :0]) * x, inner=lambda: nn.Linear(0, 4), w=(4,)), rows(4))
add("nothing-comes-out", lambda: nn.Linear(6, 0), rows(6), slices="the model itself|Linear")
add("one-feature", chain(functools.partial(nn.Linear, 1, 1)), rows(1))
add(
    "by-shape",
    written(lambda m, x: m.a(x) if x.shape[-1] == 4 else m.b(x), a=linear, b=lambda: nn.Linear(3, 5)),
    rows(4),
)
add("by-training", written(lambda m, x: m.a(x) if m.training else m.b(x), a=linear, b=linear), rows(4))
add(
    "by-step",
    written(lambda m, x: m.a(x) if m.flip else m.b(x), a=linear, b=linear, flip=False),
    rows(4),
    prepare=lambda m: setattr(m, "flip", True),
)
add("frozen-later", _frozen(), rows(4), prepare=lambda m: m.get_parameter("2.weight").requires_grad_(False))
add(
    "unfrozen-later",
    _frozen("2.weight"),
    rows(4),
    prepare=lambda m: m.get_parameter("2.weight").requires_grad_(True),
)
add(
    "parameter-replaced",
    _frozen(),
    rows(4),
    prepare=lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.detach() * 2)),
)
add(
    "evaluated-later",
    chain(square, nn.Dropout, square),
    rows(4),
    prepare=lambda m: m.eval(),
    random=True,
    floats=("float64",),
)
add("other-batch-sizes", chain(square, nn.Tanh, linear), rows(4), sizes=(6, 9, 3, 12, 6))
add("one-sample-later", chain(square, nn.Tanh, linear), rows(4), sizes=(6, 3, 6))
add(
    "module-list",
    written(
        lambda m, x: functools.reduce(lambda h, f: f(h).tanh(), m.blocks, x),
        blocks=lambda: nn.ModuleList([square() for _ in range(3)]),
    ),
    rows(4),
)
add(
    "module-dict",
    written(
        lambda m, x: m.parts["a"](x) + m.parts["b"](x),
        parts=lambda: nn.ModuleDict({"a": linear(), "b": linear()}),
    ),
    rows(4),
)
add(
    "lambda-captures",
    written(lambda m, x: (lambda f: f(f(x)))(lambda h: F.linear(h, m.w)), w=(4, 4)),
    rows(4),
)
add(
    "weights-gathered",
    written(
        lambda m, x: F.linear(x, torch.cat([m.a.weight, m.b.weight]), torch.cat([m.a.bias, m.b.bias])),
        a=linear,
        b=linear,
    ),
    rows(4),
)
add(
    "weights-stacked",
    written(
        lambda m, x: torch.einsum("bi,noi->bno", x, torch.stack([m.a.weight, m.b.weight])), a=linear, b=linear
    ),
    rows(4),
)
add("weights-flattened", written(lambda m, x: F.linear(x, m.w[:20].view(5, 4), m.w[20:]), w=(25,)), rows(4))
add("deep-copied-child", chain(square, nn.Tanh, lambda: copy.deepcopy(square())), rows(4))
add("forward-hook", lambda: _with_hook(chain(square, nn.Tanh, square)()), rows(4))
add("forward-pre-hook", lambda: _with_pre_hook(chain(square, nn.Tanh, square)()), rows(4))


def _with_hook(model):
    model[0].register_forward_hook(lambda module, args, out: out * module.bias)
    return model


def _with_pre_hook(model):
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * module.bias,))
    return model
