"""Every layer of torch.nn that has parameters: first in line, and behind another layer."""

from __future__ import annotations

import functools

import torch
from torch import nn

from .case import BY_NAME, NO_RULE, Family, chain, indices, rows, written

add = Family("layers")
CASES = add.cases

GRADED = {
    "linear": (lambda: nn.Linear(4, 5), (3, 4)),
    "linear-without-bias": (lambda: nn.Linear(4, 5, bias=False), (4,)),
    "linear-of-images": (lambda: nn.Linear(4, 5), (2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 7)),
    "conv1d-same-dilated": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (4, 7)),
    "conv1d-grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1), (4, 5, 6)),
    "conv2d-strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)), (4, 7, 6)),
    "conv2d-patches": (lambda: nn.Conv2d(4, 6, 2, stride=2), (4, 6, 6)),
    "conv2d-dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=(1, 2)), (4, 6, 7)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)),
    "conv2d-depthwise-multiplied": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (4, 5, 5)),
    "conv2d-valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 5, 5)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 5, 5)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5, 5)),
    "conv2d-replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 4)),
    "conv3d-grouped": (lambda: nn.Conv3d(4, 4, 2, groups=2, stride=(1, 2, 2)), (4, 3, 4, 4)),
    "conv-transpose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), (4, 5)),
    "conv-transpose2d": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (4, 3, 3)),
    "conv-transpose2d-padded": (
        lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 3, 3),
    ),
    "conv-transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3)),
    "layer-norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer-norm-of-two": (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    "layer-norm-without-bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "group-norm-images": (lambda: nn.GroupNorm(4, 4), (4, 3, 3)),
    "group-norm-vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "rms-norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "rms-norm-epsilon": (lambda: nn.RMSNorm((3, 4), eps=1e-3), (3, 4)),
    "instance-norm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "instance-norm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "local-response-norm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.LocalResponseNorm(2)), (4, 3, 3)),
    "prelu": (lambda: nn.PReLU(), (4, 3)),
    "prelu-by-channel": (lambda: nn.PReLU(4), (4, 3)),
    "gru": (lambda: First(nn.GRU(4, 5, batch_first=True)), (3, 4)),
    "gru-bidirectional": (lambda: First(nn.GRU(4, 3, 2, batch_first=True, bidirectional=True)), (3, 4)),
    "lstm": (lambda: First(nn.LSTM(4, 5, batch_first=True)), (3, 4)),
    "lstm-projected": (lambda: First(nn.LSTM(4, 5, batch_first=True, proj_size=2)), (3, 4)),
    "lstm-without-bias": (lambda: First(nn.LSTM(4, 5, bias=False, batch_first=True)), (3, 4)),
    "rnn": (lambda: First(nn.RNN(4, 5, batch_first=True, nonlinearity="relu")), (3, 4)),
    "gru-cell": (lambda: nn.GRUCell(4, 5), (4,)),
    "lstm-cell": (lambda: First(nn.LSTMCell(4, 5)), (4,)),
    "rnn-cell": (lambda: nn.RNNCell(4, 5), (4,)),
    "attention": (lambda: Attention(batch_first=True), (3, 4)),
    "attention-with-key-bias": (lambda: Attention(batch_first=True, add_bias_kv=True), (3, 4)),
    "attention-without-bias": (lambda: Attention(batch_first=True, bias=False, add_zero_attn=True), (3, 4)),
    "encoder-layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (3, 4)),
    "encoder-layer-norm-first": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, norm_first=True),
        (3, 4),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2),
        (3, 4),
    ),
    "time-distributed-gru": (lambda: BatchSecond(nn.GRU(4, 5)), (3, 4)),
    "time-distributed-attention": (lambda: BatchSecond(Attention()), (3, 4)),
    "time-distributed-encoder": (lambda: BatchSecond(nn.TransformerEncoderLayer(4, 2, 8, 0.0)), (3, 4)),
    "softmax-of-linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1)), (3, 4)),
    "pixel-shuffle": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.PixelShuffle(2)), (4, 3, 3)),
    "pixel-unshuffle": (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(16, 3, 1)), (4, 4, 4)),
    "unfold-fold": (
        lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Conv1d(16, 16, 1), nn.Fold((4, 4), 2, stride=2)),
        (4, 4, 4),
    ),
    "upsampled": (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3)), (4, 3, 3)),
    "pooled": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)),
        (4, 5, 5),
    ),
    "max-pooled": (lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.MaxPool2d(2), nn.Flatten(1, -1)), (4, 4, 4)),
    "channel-shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1, groups=2), nn.ChannelShuffle(2), nn.Conv2d(4, 4, 1, groups=2)
        ),
        (4, 3, 3),
    ),
    "unflattened": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(-1, (2, 3)), nn.Linear(3, 2)), (4,)),
    "glu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU(-1), nn.Linear(3, 2)), (4,)),
}


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class Attention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class BatchSecond(nn.Module):
    """A layer that wants the batch in dimension 1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x.transpose(0, 1))
        return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)


#: Layers without a rule: a model that is one of them alone runs in slices.
UNRULED = [
    "conv2d-same",
    "conv-transpose1d",
    "conv-transpose2d",
    "conv-transpose2d-padded",
    "conv-transpose3d",
    "instance-norm",
    "instance-norm2d",
    "prelu",
    "prelu-by-channel",
    "gru-cell",
    "rnn-cell",
    "time-distributed-gru",
    "time-distributed-attention",
    "time-distributed-encoder",
]
for name, (layer, shape) in GRADED.items():
    add(name, layer, rows(*shape), slices=BY_NAME if name in UNRULED else None)
    before = functools.partial(nn.Linear, shape[-1], shape[-1])
    add(f"{name}-second", chain(before, nn.Tanh, layer), rows(*shape))

add("bilinear", written(lambda m, x, y: m.inner(x, y), inner=lambda: nn.Bilinear(4, 3, 5)), rows(4), rows(3))
add(
    "bilinear-second",
    written(
        lambda m, x: m.inner(m.first(x).sin(), x),
        first=lambda: nn.Linear(4, 3),
        inner=lambda: nn.Bilinear(3, 4, 5, bias=False),
    ),
    rows(4),
)
add(
    "identity-needs-parameters",
    written(lambda m, x: m.norm(x) * m.w, norm=lambda: nn.LayerNorm(4, elementwise_affine=False), w=(4,)),
    rows(4),
)

for name, make in {
    "embedding": lambda: nn.Embedding(7, 4),
    "embedding-padded": lambda: nn.Embedding(7, 4, padding_idx=2),
    "embedding-padded-negative": lambda: nn.Embedding(7, 4, padding_idx=-1),
}.items():
    add(name, make, indices(7))
    add(f"{name}-of-sequences", chain(make, nn.Tanh, lambda: nn.Linear(4, 3)), indices(7, 5))
add("embedding-sparse", lambda: nn.Embedding(7, 4, sparse=True), indices(7, 3), refused="sparse")
add(
    "embedding-bag-sparse",
    lambda: nn.EmbeddingBag(7, 4, sparse=True),
    indices(7, 3),
    refused="sparse|embedding_bag",
    slices=NO_RULE,
)
add("embedding-max-norm", chain(lambda: nn.Embedding(7, 4, max_norm=1.0), nn.Tanh), indices(7, 3))
for mode in ("mean", "sum", "max"):
    add(
        f"embedding-bag-{mode}",
        lambda mode=mode: nn.EmbeddingBag(7, 4, mode=mode),
        indices(7, 3),
        slices=NO_RULE,
    )
add(
    "embedding-bag-weighted",
    written(lambda m, t, w: m.bag(t, per_sample_weights=w), bag=lambda: nn.EmbeddingBag(7, 4, mode="sum")),
    indices(7, 3),
    rows(3),
)
add(
    "embedding-bag-offsets",
    lambda: nn.EmbeddingBag(7, 4),
    lambda size: torch.randint(7, (2 * size,)),
    lambda size: torch.arange(size) * 2,
    either="EmbeddingBag|offsets|model: expected|the model itself",
)
add(
    "embedding-bag-second",
    written(
        lambda m, x, t: m.bag(t) + m.inner(x),
        bag=lambda: nn.EmbeddingBag(7, 4),
        inner=lambda: nn.Linear(4, 4),
    ),
    rows(4),
    indices(7, 3),
)

add(
    "decoder-layer",
    lambda: nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True),
    rows(3, 4),
    rows(5, 4),
)
add(
    "decoder",
    written(
        lambda m, x, y: m.inner(x, y, tgt_is_causal=False),
        inner=lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True), 2),
    ),
    rows(3, 4),
    rows(5, 4),
)
add("transformer", lambda: nn.Transformer(4, 2, 1, 1, 8, 0.0, batch_first=True), rows(3, 4), rows(2, 4))
add(
    "causal-attention",
    written(
        lambda m, x: m.inner(
            x, x, x, attn_mask=torch.full((3, 3), float("-inf")).triu(1).to(x), need_weights=False
        )[0],
        inner=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    rows(3, 4),
)
add(
    "masked-attention",
    written(
        lambda m, x, mask: m.inner(x, x, x, key_padding_mask=mask)[0],
        inner=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    rows(3, 4),
    lambda size: torch.arange(3) > torch.arange(size)[:, None] % 2,
)
add(
    "cross-attention",
    written(
        lambda m, x, y: m.inner(x, y, y)[0],
        inner=lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True),
    ),
    rows(3, 4),
    rows(5, 3),
)
add(
    "attention-weights",
    written(
        lambda m, x: torch.cat([t.flatten(1) for t in m.inner(x, x, x)], 1),
        inner=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    rows(3, 4),
)
add(
    "gru-with-state",
    written(lambda m, x, h: m.inner(x, h[None])[0], inner=lambda: nn.GRU(4, 5, batch_first=True)),
    rows(3, 4),
    rows(5),
)
add(
    "gru-last-state",
    written(lambda m, x: m.inner(x)[1][0], inner=lambda: nn.GRU(4, 5, batch_first=True)),
    rows(3, 4),
)
add(
    "gru-learned-state",
    written(
        lambda m, x: m.inner(x, m.h.expand(1, len(x), 5).contiguous())[0],
        inner=lambda: nn.GRU(4, 5, batch_first=True),
        h=(1, 1, 5),
    ),
    rows(3, 4),
    slices=NO_RULE,
)
add("lstm-unrolled", written(lambda m, x: _unrolled(m, x), cell=lambda: nn.LSTMCell(4, 5)), rows(3, 4))
add(
    "gru-twice",
    written(
        lambda m, x: m.b(m.a(x)[0])[0],
        a=lambda: nn.GRU(4, 5, batch_first=True),
        b=lambda: nn.GRU(5, 2, batch_first=True),
    ),
    rows(3, 4),
)


def _unrolled(m, x):
    state = None
    for step in x.unbind(1):
        state = m.cell(step, state)
    return torch.cat(state, 1)


add(
    "dropout",
    chain(lambda: nn.Linear(4, 5), lambda: nn.Dropout(0.5), lambda: nn.Linear(5, 3)),
    rows(4),
    random=True,
    floats=("float64",),
)
add(
    "autocast-linear",
    chain(lambda: nn.Linear(8, 16), nn.GELU, lambda: nn.Linear(16, 8)),
    rows(8),
    floats=("bfloat16",),
)
add(
    "autocast-convolution",
    chain(lambda: nn.Conv2d(3, 8, 3), lambda: nn.GroupNorm(2, 8), nn.SiLU, lambda: nn.Conv2d(8, 3, 3)),
    rows(3, 8, 8),
    floats=("bfloat16",),
)
add(
    "autocast-norms",
    chain(
        lambda: nn.Linear(8, 8),
        lambda: nn.LayerNorm(8),
        nn.Tanh,
        lambda: nn.RMSNorm(8),
        lambda: nn.Linear(8, 4),
    ),
    rows(3, 8),
    floats=("bfloat16",),
)
add(
    "autocast-encoder",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
    rows(3, 8),
    floats=("bfloat16",),
)
add(
    "autocast-derived",
    written(lambda m, x: torch.nn.functional.linear(x, m.w * m.b[:, None], m.b), w=(4, 8), b=(4,)),
    rows(8),
    floats=("bfloat16",),
)
add(
    "autocast-embedding",
    chain(lambda: nn.Embedding(7, 8), lambda: nn.Linear(8, 4)),
    indices(7, 3),
    floats=("bfloat16",),
)
add("autocast-gru", lambda: First(nn.GRU(4, 5, batch_first=True)), rows(3, 4), floats=("bfloat16",))
