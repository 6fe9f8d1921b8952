"""Models whose samples have an effect on each other, and outputs that are no rows of samples: refused by name."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from .case import Family, chain, given, indices, rows, written

add = Family("mixing")
CASES = add.cases

MIXED = r"depend|mixed|others' rows|training mode|mixes"
linear = functools.partial(nn.Linear, 4, 5)
square = functools.partial(nn.Linear, 4, 4)

for name, mix in {
    "mean-over-the-batch": lambda h: h - h.mean(0),
    "sum-over-the-batch": lambda h: h + h.sum(0, keepdim=True),
    "softmax-over-the-batch": lambda h: h.softmax(0),
    "attention-over-the-batch": lambda h: (h @ h.mT).softmax(-1) @ h,
    "rolled": lambda h: h + h.roll(1, 0),
    "flipped": lambda h: h + h.flip(0),
    "maximum-of-the-batch": lambda h: h / h.amax().detach().abs().add(1),
    "sorted-over-the-batch": lambda h: h.sort(0).values,
    "cumulated-over-the-batch": lambda h: h.cumsum(0),
    "normalised-over-the-batch": lambda h: (h - h.mean(0)) / (h.std(0) + 1),
    "minibatch-standard-deviation": lambda h: h + h.std(0).mean(),
    "first-sample": lambda h: h + h[:1],
    "pairs": lambda h: h + h.view(-1, 2, h.shape[-1]).mean(1).repeat_interleave(2, 0),
    "batch-norm-function": lambda h: F.batch_norm(h, None, None, training=True),
    "interpolated-over-the-batch": lambda h: F.avg_pool1d(h.T, 3, 1, 1).T,
    "loss-of-two-halves": lambda h: torch.cat([h[: len(h) // 2] + h[len(h) // 2 :], h[len(h) // 2 :]]),
}.items():
    add(
        name,
        written(lambda m, x, f=mix: m.last(f(m.first(x))), first=square, last=linear),
        rows(4),
        refused=MIXED,
    )
    add(
        f"{name}-at-the-end", written(lambda m, x, f=mix: f(m.first(x)), first=square), rows(4), refused=MIXED
    )
    add(f"{name}-of-the-input", written(lambda m, x, f=mix: m.last(f(x)), last=linear), rows(4), either=MIXED)
add("batch-norm", chain(square, lambda: nn.BatchNorm1d(4), square), rows(4), refused="BatchNorm.*1")
add(
    "batch-norm-without-statistics",
    lambda: nn.Sequential(square(), nn.BatchNorm1d(4, track_running_stats=False)).eval(),
    rows(4),
    refused="1|BatchNorm|depend",
)
add("batch-norm-eval", lambda: chain(square, lambda: nn.BatchNorm1d(4), square)().eval(), rows(4))
add(
    "instance-norm-tracked",
    chain(lambda: nn.Conv1d(3, 4, 1), lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    rows(3, 5),
    refused="running_mean",
)
add(
    "attention-with-the-batch-in-front",
    written(lambda m, x: m.attention(x, x, x)[0], attention=lambda: nn.MultiheadAttention(4, 2)),
    rows(3, 4),
    refused=f"{MIXED}|slices of it fail",
)
add(
    "large-batches",
    written(
        lambda m, x: m.last((lambda h: h - h.mean(0) if len(h) > 8 else h)(m.first(x))),
        first=square,
        last=linear,
    ),
    rows(4),
    refused=MIXED,
    sizes=(8, 9),
)
add(
    "small-batches",
    written(
        lambda m, x: m.last((lambda h: h - h.mean(0) if len(h) < 8 else h)(m.first(x))),
        first=square,
        last=linear,
    ),
    rows(4),
    refused=MIXED,
    sizes=(9, 6),
)
add(
    "odd-batches",
    written(
        lambda m, x: m.last((lambda h: h - h.mean(0) if len(h) % 2 else h)(m.first(x))),
        first=square,
        last=linear,
    ),
    rows(4),
    refused=MIXED,
    sizes=(6, 8, 9),
)
add(
    "from-the-start-in-large-batches",
    written(
        lambda m, x: m.last((lambda h: h - h.mean(0) if len(h) > 8 else h)(m.first(x))),
        first=square,
        last=linear,
    ),
    rows(4),
    refused=MIXED,
    sizes=(9, 9),
)
add(
    "rows-are-tokens",
    written(lambda m, x: m.inner(x).flatten(0, 1), inner=linear),
    rows(3, 4),
    refused="row per sample|row for every|dimension 0|one row",
    output=lambda out: out.view(6, -1),
)
add(
    "scalar-output",
    written(lambda m, x: m.inner(x).mean(), inner=linear),
    rows(4),
    refused="row|sample|batch|depend",
    output=lambda out: out.expand(6, 1),
)
add(
    "whole-batch-argument",
    written(lambda m, x, w: m.inner(x) * (w @ torch.ones(6).to(w)), inner=linear),
    rows(4),
    given(lambda: torch.linspace(0, 1, 6)),
    either="row|shared|sample",
)
add(
    "scaled-by-frequency",
    chain(lambda: nn.Embedding(5, 4, scale_grad_by_freq=True)),
    indices(5, 3),
    whole="frequencies in the batch",
)
add("max-norm", chain(lambda: nn.Embedding(5, 4, max_norm=1.0)), indices(5, 3))
add(
    "noise-in-eval",
    lambda: written(lambda m, x: m.inner(x + 0.1 * torch.randn_like(x)), inner=linear)().eval(),
    rows(4),
    random=True,
    floats=("float64",),
    whole="random|noise",
)
