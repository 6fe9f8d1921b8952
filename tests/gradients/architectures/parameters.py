"""Raw parameters in every position, and tensors derived from parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import BY_NAME, NO_RULE, Family, indices, rows, written

add = Family("parameters")
CASES = add.cases

# Combined with the batch element by element.
add("added", written(lambda m, x: m.inner(x) + m.w, inner=lambda: nn.Linear(4, 5), w=(5,)), rows(4))
add(
    "added-to-the-input",
    written(lambda m, x: m.inner(x + m.w), inner=lambda: nn.Linear(4, 5), w=(4,)),
    rows(4),
)
add("multiplied", written(lambda m, x: torch.tanh(x * m.w) * m.v, w=(4,), v=(1,)), rows(4))
add("scalar", written(lambda m, x: torch.tanh(x * m.w) + m.w, w=()), rows(4))
add("divided-by", written(lambda m, x: x / (m.w.square() + 1), w=(4,)), rows(4))
add("divided", written(lambda m, x: m.w / (x.square() + 1), w=(4,)), rows(4))
add("subtracted-from", written(lambda m, x: m.w - x, w=(4,)), rows(4))
add("power", written(lambda m, x: (x.square() + 1) ** m.w, w=(4,)), rows(4))
add("middle-dimensions", written(lambda m, x: torch.sin(x * m.w) + m.v, w=(3, 1), v=(1, 1, 4)), rows(2, 3, 4))
add("leading-one", written(lambda m, x: torch.sin(x + m.w), w=(1, 3, 4)), rows(3, 4))
add("broadcasts-the-batch", written(lambda m, x: torch.sin(x * m.w), w=(3, 4)), rows(1, 4))
add("maximum", written(lambda m, x: torch.maximum(x, m.w), w=(4,)), rows(4))
add("where", written(lambda m, x: torch.where(x > 0, m.w, x * m.v), w=(4,), v=(4,)), rows(4))
add("clamp", written(lambda m, x: torch.clamp(x, min=m.low), low=(4,)), rows(4))
add("lerp", written(lambda m, x: torch.lerp(x, m.w, m.v), w=(4,), v=(4,)), rows(4))
add("lerp-towards-x", written(lambda m, x: torch.lerp(m.w, x, m.v), w=(4,), v=(4,)), rows(4))
add("addcmul", written(lambda m, x: torch.addcmul(m.b, x, m.w, value=2.0), b=(4,), w=(4,)), rows(4))
add("addcdiv", written(lambda m, x: torch.addcdiv(x, m.w, x.square() + 1), w=(4,)), rows(4), slices=NO_RULE)
add("atan2", written(lambda m, x: torch.atan2(x, m.w), w=(4,)), rows(4), slices=NO_RULE)
add("hypot", written(lambda m, x: torch.hypot(x, m.w), w=(4,)), rows(4), slices=NO_RULE)
add(
    "in-place-add", written(lambda m, x: m.inner(x).add_(m.w), inner=lambda: nn.Linear(4, 5), w=(5,)), rows(4)
)
add(
    "in-place-multiply",
    written(lambda m, x: (m.inner(x) + 0).mul_(m.w), inner=lambda: nn.Linear(4, 5), w=(5,)),
    rows(4),
)
add(
    "as-long-as-the-batch",
    written(lambda m, x: m.inner(x) * m.w.sum(), inner=lambda: nn.Linear(4, 5), w=(6,)),
    rows(4),
)
add("row-as-long-as-the-batch", written(lambda m, x: torch.tanh(x * m.w), w=(6,)), rows(6))
add(
    "column-as-long-as-the-batch",
    written(lambda m, x: m.inner(x) * m.w[:, None], inner=lambda: nn.Linear(4, 5), w=(6,)),
    rows(4),
    either="model: expected|the model itself",
)
add("square-of-the-batch", written(lambda m, x: torch.tanh(x @ m.w), w=(6, 6)), rows(6))
add("silent", written(lambda m, x: torch.tanh(x * 0 + m.w) + x * 0, w=(4,)), rows(4))


# Joined to the batch.
def _token(m, x):
    return m.inner(torch.cat([m.token.expand(len(x), -1, -1), x], 1))


add("class-token", written(_token, inner=lambda: nn.Linear(4, 5), token=(1, 1, 4)), rows(3, 4))
add(
    "class-token-repeat",
    written(
        lambda m, x: m.inner(torch.cat([m.token.repeat(len(x), 1, 1), x], 1)),
        inner=lambda: nn.Linear(4, 5),
        token=(1, 1, 4),
    ),
    rows(3, 4),
)
add(
    "class-token-expand-as",
    written(
        lambda m, x: m.inner(torch.cat([m.token.expand_as(x[:, :1]), x], 1)),
        inner=lambda: nn.Linear(4, 5),
        token=(4,),
    ),
    rows(3, 4),
)
add(
    "class-token-broadcast-to",
    written(
        lambda m, x: m.inner(torch.cat([torch.broadcast_to(m.token, x[:, :1].shape), x], 1)),
        inner=lambda: nn.Linear(4, 5),
        token=(1, 1, 4),
    ),
    rows(3, 4),
)
add(
    "registers-at-the-end",
    written(
        lambda m, x: m.inner(torch.cat((x, m.w.unsqueeze(0).expand(x.shape[0], -1, -1)), dim=1)).sin(),
        inner=lambda: nn.Linear(4, 5),
        w=(2, 4),
    ),
    rows(3, 4),
)
add("stack", written(lambda m, x: torch.stack([x, m.w.expand_as(x)], 1).sin(), w=(4,)), rows(4))
add("hstack", written(lambda m, x: torch.hstack([x, m.w.expand(len(x), 3)]).sin(), w=(3,)), rows(4))
add(
    "token-plus-zeros",
    written(lambda m, x: torch.cat([x, m.w + torch.zeros_like(x)], 1).sin(), w=(4,)),
    rows(4),
)
add("one-output-is-a-parameter", written(lambda m, x: m.w.expand_as(x) + 0 * x, w=(4,)), rows(4))

# Looked up.
add("indexed", written(lambda m, t: m.w[t].sin(), w=(7, 4)), indices(7), slices=NO_RULE)
add("indexed-in-column", written(lambda m, t: m.w[:, t].sin().T, w=(4, 7)), indices(7), slices=NO_RULE)
add(
    "indexed-twice",
    written(lambda m, t, s: m.w[t, s].sin(), w=(7, 5, 3)),
    indices(7),
    indices(5),
    slices=NO_RULE,
)
add(
    "index-select",
    written(lambda m, t: torch.index_select(m.w, 0, t).sin(), w=(7, 4)),
    indices(7),
    slices=NO_RULE,
)
add("gather", written(lambda m, t: m.w.expand(len(t), -1).gather(1, t).sin(), w=(7,)), indices(7, 3))
add("take", written(lambda m, t: m.w.take(t).sin(), w=(7,)), indices(7, 3), slices=NO_RULE)
add(
    "take-along-dim",
    written(lambda m, t: torch.take_along_dim(m.w[None], t, 1).sin(), w=(7,)),
    indices(7, 3),
    slices=NO_RULE,
)
add(
    "mask-of-the-batch",
    written(lambda m, x: x * m.w[None].expand_as(x)[:, :1] + (x > 0) * m.w, w=(4,)),
    rows(4),
)
add(
    "table-of-matrices",
    written(lambda m, x, t: torch.einsum("bi,bio->bo", x, m.w[t]), w=(7, 4, 3)),
    rows(4),
    indices(7),
    slices=NO_RULE,
)
add(
    "table-by-bmm",
    written(lambda m, x, t: torch.bmm(x[:, None], m.w[t])[:, 0], w=(7, 4, 3)),
    rows(4),
    indices(7),
    slices=NO_RULE,
)
add("one-hot", written(lambda m, t: (F.one_hot(t, 7).to(m.w.dtype) @ m.w).sin(), w=(7, 4)), indices(7))
add(
    "interpolated-table",
    written(lambda m, x: (1 - x.sigmoid()) * m.w[:4] + x.sigmoid() * m.w[4:], w=(8,)),
    rows(4),
)
add("slice", written(lambda m, x: x * m.w[2:6] + m.w[:4], w=(8,)), rows(4))
add(
    "sinusoidal-frequencies",
    written(lambda m, t: torch.cat([torch.sin(t * m.w), torch.cos(t * m.w)], -1), w=(4,)),
    rows(1),
)
add(
    "position-grown",
    written(lambda m, x: x + F.interpolate(m.w, size=x.shape[-2:], mode="bilinear"), w=(1, 3, 2, 2)),
    rows(3, 4, 4),
)
add("position-cut", written(lambda m, x: (x + m.w[:, : x.shape[1]]).sin(), w=(1, 9, 4)), rows(3, 4))
add("rotary", written(lambda m, x: x * torch.cos(m.w * torch.arange(3.0).to(x)[:, None]), w=(4,)), rows(3, 4))
add(
    "relative-bias",
    written(
        lambda m, x: (x @ x.mT + m.w[(torch.arange(3)[:, None] - torch.arange(3)) + 2]).softmax(-1) @ x,
        w=(5,),
    ),
    rows(3, 4),
)


# Scattered and written.
def _column(m, x):
    h = x.clone()
    h[:, 1] = m.w
    return m.inner(h).sin()


def _masked(m, x):
    h = x.clone()
    h[x > 0] = m.w
    return h.sin() * m.v


def _copied(m, x):
    h = torch.zeros_like(x)
    h.copy_(m.w.expand_as(x))
    return h * x


def _written_to_activation(m, x):
    h = m.inner(x)
    h[:, 1] = m.w
    return h.sin()


def _filled(m, x):
    h = x.new_zeros(len(x), 5, 4)
    h[:, :3] = x
    h[:, 3:] = m.w
    return m.inner(h).sin()


linear4 = {"inner": lambda: nn.Linear(4, 5)}
add(
    "written-into-a-clone",
    written(_column, w=(3, 4)[1:], inner=lambda: nn.Linear(4, 5)),
    rows(3, 4),
    slices=BY_NAME,
)
add("written-by-mask", written(_masked, w=(), v=(4,)), rows(4), slices=BY_NAME)
add("copied-into-zeros", written(_copied, w=(4,)), rows(4), slices=BY_NAME)
add(
    "written-into-an-activation",
    written(_written_to_activation, w=(1,), inner=lambda: nn.Linear(4, 5)),
    rows(4),
    slices=NO_RULE,
)
add("filled-sequence", written(_filled, w=(2, 4), inner=lambda: nn.Linear(4, 5)), rows(3, 4), slices=BY_NAME)
add("masked-fill", written(lambda m, x: x.masked_fill(x > 0, m.w).sin(), w=()), rows(4), slices=BY_NAME)
add(
    "masked-fill-of-activation",
    written(lambda m, x: m.inner(x).masked_fill(x > 0, m.w).sin(), w=(), inner=lambda: nn.Linear(4, 4)),
    rows(4),
    slices=BY_NAME,
)
add(
    "masked-scatter",
    written(
        lambda m, x: x.masked_scatter(
            torch.tensor([True, False, True, False]).expand_as(x), m.w.expand(len(x), 2)
        ).sin(),
        w=(2,),
    ),
    rows(4),
    slices=BY_NAME,
)
add(
    "scatter",
    written(lambda m, x, t: torch.zeros_like(x).scatter(1, t, m.w.expand(len(x), 1)) * x, w=(1,)),
    rows(4),
    indices(4, 1),
    slices=BY_NAME,
)
add(
    "scatter-add",
    written(lambda m, x, t: x.scatter_add(1, t, m.w.expand(len(x), -1)).sin(), w=(2,)),
    rows(4),
    indices(4, 2),
    slices=BY_NAME,
)
add(
    "index-add",
    written(lambda m, x: x.index_add(1, torch.tensor([0, 2]), m.w.expand(len(x), 2)).sin(), w=(2,)),
    rows(4),
    slices=BY_NAME,
)
add(
    "index-put",
    written(
        lambda m, x: x.index_put((torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)), m.w).sin(),
        w=(1,),
    ),
    rows(4),
    slices=BY_NAME,
)
add(
    "index-fill-scalar",
    written(lambda m, x: x.index_fill(1, torch.tensor([1]), m.w).sin(), w=()),
    rows(4),
    slices=BY_NAME,
)
add(
    "select-scatter",
    written(lambda m, x: torch.select_scatter(x, m.w.expand(len(x)), 1, 2).sin(), w=(1,)),
    rows(4),
    slices=BY_NAME,
)
add(
    "slice-scatter",
    written(lambda m, x: torch.slice_scatter(x, m.w.expand(len(x), 2), 1, 1, 3).sin(), w=(2,)),
    rows(4),
    slices=BY_NAME,
)
add("padded", written(lambda m, x: F.pad(x, (1, 1)) * F.pad(m.w, (1, 1), value=0.5), w=(4,)), rows(4))

# Products.
add("matmul-right", written(lambda m, x: x @ m.w, w=(4, 5)), rows(4))
add("matmul-left", written(lambda m, x: m.w @ x, w=(5, 3)), rows(3, 4), slices=NO_RULE)
add("matmul-both", written(lambda m, x: m.v @ x @ m.w, w=(4, 5), v=(2, 3)), rows(3, 4), slices=NO_RULE)
add(
    "matmul-left-of-vector",
    written(lambda m, x: (m.w @ x.unsqueeze(-1)).squeeze(-1), w=(5, 4)),
    rows(4),
    slices=NO_RULE,
)
add("matmul-with-vector", written(lambda m, x: x @ m.w, w=(4,)), rows(3, 4), slices=NO_RULE)
add("matmul-transposed-batch", written(lambda m, x: (m.w @ x.T).T, w=(5, 4)), rows(4), slices=NO_RULE)
add("matmul-batched-weight", written(lambda m, x: x @ m.w, w=(3, 4, 5)), rows(3, 2, 4), slices=NO_RULE)
add("mv", written(lambda m, x: torch.mv(x, m.w)[:, None].sin(), w=(4,)), rows(4), slices=NO_RULE)
add("mm", written(lambda m, x: torch.mm(x, m.w), w=(4, 5)), rows(4), slices=NO_RULE)
add("bmm", written(lambda m, x: torch.bmm(x, m.w.expand(len(x), 4, 5)), w=(1, 4, 5)), rows(3, 4))
add(
    "bmm-by-heads",
    written(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=(3, 4, 5)),
    rows(3, 4),
    slices=NO_RULE,
)
add("addmm", written(lambda m, x: torch.addmm(m.b, x, m.w), w=(4, 5), b=(5,)), rows(4), slices=NO_RULE)
add(
    "addmm-scaled",
    written(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), w=(4, 5), b=(5,)),
    rows(4),
    slices=NO_RULE,
)
add(
    "baddbmm",
    written(lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), 4, 5)), w=(1, 4, 5), b=(1, 1, 5)),
    rows(3, 4),
    slices=NO_RULE,
)
add(
    "addbmm-refused",
    written(lambda m, x: torch.addbmm(m.b, x, x.mT).expand(len(x), 3, 3), b=(3, 3)),
    rows(3, 4),
    refused="depend|mixed|row|no rule for addbmm",
)
add("einsum", written(lambda m, x: torch.einsum("bi,io->bo", x, m.w), w=(4, 5)), rows(4))
add(
    "einsum-weight-first",
    written(lambda m, x: torch.einsum("io, ...i -> ...o", m.w, x), w=(4, 5)),
    rows(3, 4),
)
add("einsum-heads", written(lambda m, x: torch.einsum("bnd,hde->bhne", x, m.w), w=(2, 4, 3)), rows(3, 4))
add(
    "einsum-two",
    written(lambda m, x: torch.einsum("bi,io,o->bo", x, m.w, m.v), w=(4, 5), v=(5,)),
    rows(4),
    slices=NO_RULE,
)
add(
    "einsum-batch-last",
    written(lambda m, x: torch.einsum("ib,io->bo", x.T, m.w), w=(4, 5)),
    rows(4),
    slices=NO_RULE,
)
add(
    "einsum-three-way",
    written(lambda m, x, y: torch.einsum("bi,bj,ijk->bk", x, y, m.w), w=(4, 3, 5)),
    rows(4),
    rows(3),
    slices=NO_RULE,
)
add(
    "tensordot",
    written(lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [0, 1])), w=(3, 4, 5)),
    rows(3, 4),
    slices=NO_RULE,
)
add("inner", written(lambda m, x: torch.inner(x, m.w), w=(5, 4)), rows(4), slices=NO_RULE)
add("outer", written(lambda m, x: torch.outer(x[:, 0], m.w).sin(), w=(4,)), rows(4), slices=NO_RULE)
add("kron-of-parameters", written(lambda m, x: x @ torch.kron(m.a, m.b), a=(2, 3), b=(2, 2)), rows(4))
add(
    "f-bilinear",
    written(lambda m, x, y: F.bilinear(x, y, m.w, m.b), w=(5, 4, 3), b=(5,)),
    rows(4),
    rows(3),
    slices=NO_RULE,
)
add("f-linear-no-bias", written(lambda m, x: F.linear(x, m.w), w=(5, 4)), rows(4))
add("f-linear-vector", written(lambda m, x: F.linear(x, m.w)[:, None].sin(), w=(4,)), rows(4), slices=BY_NAME)
add(
    "f-linear-keywords",
    written(lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), w=(5, 4), b=(5,)),
    rows(4),
)
add("f-linear-tied-rows", written(lambda m, x: F.linear(x, m.w, m.w[:, 0]), w=(5, 4)), rows(4))
add("cdist-to-prototypes", written(lambda m, x: torch.cdist(x, m.w), w=(5, 4)), rows(4), slices=NO_RULE)
add(
    "cosine-to-prototypes",
    written(lambda m, x: F.cosine_similarity(x[:, None], m.w, dim=-1), w=(5, 4)),
    rows(4),
    slices=NO_RULE,
)
add(
    "attention-to-parameters",
    written(lambda m, x: F.scaled_dot_product_attention(x, m.k, m.v), k=(1, 3, 4), v=(1, 3, 4)),
    rows(2, 4),
    slices=NO_RULE,
)
add(
    "attention-of-learned-queries",
    written(lambda m, x: F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1), x, x), q=(2, 4)),
    rows(3, 4),
)
add(
    "attention-with-learned-bias",
    written(lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.w), w=(3, 3)),
    rows(3, 4),
    slices=NO_RULE,
)
add("f-conv", written(lambda m, x: F.conv2d(x, m.w, m.b, padding=1), w=(4, 3, 3, 3), b=(4,)), rows(3, 5, 5))
add(
    "f-conv-depthwise-derived",
    written(lambda m, x: F.conv1d(x, m.w.flip(-1), groups=3), w=(3, 1, 3)),
    rows(3, 6),
)
add("f-embedding", written(lambda m, t: F.embedding(t, m.w).sin(), w=(7, 4)), indices(7, 3))
add("f-prelu", written(lambda m, x: F.prelu(x, m.w), w=(3,)), rows(3, 4), slices=NO_RULE)
add("f-group-norm", written(lambda m, x: F.group_norm(x, 2, m.w, m.b), w=(4,), b=(4,)), rows(4, 3))
add("f-rms-norm", written(lambda m, x: F.rms_norm(x, (4,), 1 + m.w), w=(4,)), rows(3, 4))
add(
    "f-instance-norm",
    written(lambda m, x: F.instance_norm(x, weight=m.w, bias=m.b), w=(3,), b=(3,)),
    rows(3, 5),
    slices=NO_RULE,
)
add("f-layer-norm", written(lambda m, x: F.layer_norm(x, (3, 4), m.w, m.b), w=(3, 4), b=(3, 4)), rows(3, 4))
add(
    "grid-sample-of-a-parameter",
    written(
        lambda m, x: F.grid_sample(m.w.expand(len(x), -1, -1, -1), x.tanh(), align_corners=False),
        w=(1, 2, 4, 4),
    ),
    rows(3, 3, 2),
)
add("cumulated", written(lambda m, x: x * m.w.cumsum(0), w=(4,)), rows(4))
add(
    "softmaxed",
    written(lambda m, x: torch.stack([x, x.sin(), x.cos()], -1) @ m.w.softmax(0), w=(3,)),
    rows(4),
    slices=NO_RULE,
)
add("sorted", written(lambda m, x: x * m.w.sort().values, w=(4,)), rows(4))
add(
    "complex-spectrum",
    written(lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.w), n=6), w=(4, 2)),
    rows(6),
    slices=BY_NAME,
)
add(
    "complex-weights-by-parts",
    written(lambda m, x: (torch.fft.rfft(x) * torch.complex(m.a, m.b)).abs(), a=(4,), b=(4,)),
    rows(6),
    slices=BY_NAME,
)
add(
    "fourier-layer",
    written(
        lambda m, x: torch.fft.irfft(
            torch.einsum("bix,iox->box", torch.fft.rfft(x), torch.view_as_complex(m.w)), n=6
        ),
        w=(2, 3, 4, 2),
    ),
    rows(2, 6),
    slices=BY_NAME,
)
add(
    "fft-of-a-parameter",
    written(lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.w), n=6), w=(6,)),
    rows(6),
    slices=BY_NAME,
)
add(
    "complex-parameter",
    written(
        lambda m, x: (x * m.w).abs() + m.v,
        w=lambda: nn.Parameter(torch.randn(4, dtype=torch.complex128)),
        v=(4,),
    ),
    rows(4),
    refused="complex.*w|w.*complex",
    floats=("float64",),
)
add(
    "bfloat16-parameters",
    written(lambda m, x: F.linear(x.bfloat16(), m.w.bfloat16(), m.b.bfloat16()).to(x), w=(5, 4), b=(5,)),
    rows(4),
    floats=("float32",),
    tolerance=5e-2,
)
add("expand-to-batch", written(lambda m, x: (m.w.expand(x.shape[0], 4) * x).sin(), w=(4,)), rows(4))
add(
    "repeat-interleave",
    written(lambda m, x: (m.w[None].repeat_interleave(len(x), 0) * x).sin(), w=(4,)),
    rows(4),
    slices=NO_RULE,
)
add("tiled", written(lambda m, x: (torch.tile(m.w, (len(x), 1)) * x).sin(), w=(4,)), rows(4))
add(
    "list-of-parameters",
    written(
        lambda m, x: sum(x * w for w in m.ws),
        ws=lambda: nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(3)]),
    ),
    rows(4),
)
add(
    "dict-of-parameters",
    written(
        lambda m, x: x * m.ws["a"] + m.ws["b"],
        ws=lambda: nn.ParameterDict({"a": nn.Parameter(torch.randn(4)), "b": nn.Parameter(torch.randn(4))}),
    ),
    rows(4),
)
add("iterated", written(lambda m, x: sum(x * w for w in m.w), w=(3, 4)), rows(4))
add("unbound", written(lambda m, x: torch.cat([x * w for w in m.w.unbind()], 1), w=(3, 4)), rows(4))
add("chunked", written(lambda m, x: (lambda a, b: x * a + b)(*m.w.chunk(2)), w=(8,)), rows(4))
add(
    "split-linear",
    written(lambda m, x: torch.cat([F.linear(x, w) for w in m.w.split([2, 3])], 1), w=(5, 4)),
    rows(4),
)
add("detached-too", written(lambda m, x: x * m.w + x.sin() * m.w.detach(), w=(4,)), rows(4))
add("data-too", written(lambda m, x: x * m.w + x.sin() * m.w.data, w=(4,)), rows(4))
add("item-decides", written(lambda m, x: x * m.w if float(m.w[0].detach()) > -1e9 else x, w=(4,)), rows(4))
add("norm-of-a-parameter", written(lambda m, x: x * m.w / m.w.norm(), w=(4,)), rows(4))
add(
    "reshaped-by-batch",
    written(lambda m, x: (x.reshape(len(x), -1, 2) * m.w.view(1, 2)).sin().flatten(1), w=(2,)),
    rows(4, 2),
)
add("contracted-with-itself", written(lambda m, x: x @ (m.w @ m.w.T), w=(4, 2)), rows(4))
add(
    "inverse", written(lambda m, x: x @ torch.linalg.inv(m.w @ m.w.T + torch.eye(4).to(x)), w=(4, 4)), rows(4)
)
add("matrix-exponential", written(lambda m, x: x @ torch.linalg.matrix_exp(m.w - m.w.T), w=(4, 4)), rows(4))
add(
    "solve",
    written(lambda m, x: torch.linalg.solve(m.w @ m.w.T + torch.eye(4).to(x), x.T).T, w=(4, 4)),
    rows(4),
    slices=NO_RULE,
)


# Raw and derived in one call.
def bias():
    return nn.Parameter(torch.full((4,), 0.5))


add("layer-norm-derived-then-raw", written(lambda m, x: F.layer_norm(x, (4,), 1 + m.b, m.b), b=bias), rows(4))
add("layer-norm-raw-then-derived", written(lambda m, x: F.layer_norm(x, (4,), m.b, 1 + m.b), b=bias), rows(4))
add("layer-norm-raw-twice", written(lambda m, x: F.layer_norm(x, (4,), m.b, m.b), b=bias), rows(4))
add(
    "layer-norm-derived-twice", written(lambda m, x: F.layer_norm(x, (4,), 1 + m.b, 2 * m.b), b=bias), rows(4)
)
add("rms-norm-then-added", written(lambda m, x: F.rms_norm(x, (4,), 1 + m.b) + m.b, b=bias), rows(4))
add("group-norm-derived-then-raw", written(lambda m, x: F.group_norm(x, 2, 1 + m.b, m.b), b=bias), rows(4, 3))
add(
    "group-norm-raw-then-derived",
    written(lambda m, x: F.group_norm(x, 2, m.b, m.b.exp()), b=bias),
    rows(4, 3),
)
add(
    "linear-scaled-by-bias",
    written(lambda m, x: F.linear(x, m.w * m.b[:, None], m.b), w=(4, 3), b=bias),
    rows(3),
)
add("linear-bias-from-weight", written(lambda m, x: F.linear(x, m.w, m.w.sum(1)), w=(4, 3)), rows(3))
add("linear-weight-from-bias", written(lambda m, x: F.linear(x, torch.outer(m.b, m.b), m.b), b=bias), rows(4))
add("linear-input-from-weight", written(lambda m, x: F.linear(x + m.w[0], m.w, m.w[:, 0]), w=(4, 4)), rows(4))
add(
    "conv-scaled-by-bias",
    written(lambda m, x: F.conv1d(x, m.w * m.b[:, None, None], m.b), w=(4, 3, 2), b=bias),
    rows(3, 6),
)
add("conv-bias-from-weight", written(lambda m, x: F.conv1d(x, m.w, m.w.sum((1, 2))), w=(4, 3, 2)), rows(3, 6))
add("raw-then-derived-in-turn", written(lambda m, x: F.linear(F.linear(x, m.w), m.w * 2), w=(4, 4)), rows(4))
add("derived-then-raw-in-turn", written(lambda m, x: F.linear(F.linear(x, m.w * 2), m.w), w=(4, 4)), rows(4))
add("derived-and-transposed", written(lambda m, x: F.linear(F.linear(x, m.w), m.w.T), w=(5, 4)), rows(4))
add(
    "derived-twice-over",
    written(lambda m, x: F.linear(x, (m.w * m.s).exp() * m.s, m.s[:, 0]), w=(4, 4), s=(4, 1)),
    rows(4),
)
add("matmul-of-itself", written(lambda m, x: x @ m.w @ (m.w.T + m.w), w=(4, 4)), rows(4))
add(
    "embedding-and-head",
    written(lambda m, t: F.linear(F.embedding(t, m.w).sin(), m.w, m.w[:, 0]), w=(7, 4)),
    indices(7),
)
add(
    "linear-and-norm-share",
    written(lambda m, x: F.layer_norm(F.linear(x, torch.diag(m.b), m.b), (4,), m.b, m.b + 1), b=bias),
    rows(4),
)
add(
    "where-of-both",
    written(lambda m, x: torch.where(x > 0, m.b, m.b.exp()) * F.linear(x, m.b.diag(), m.b), b=bias),
    rows(4),
)
add(
    "addmm-derived-then-raw",
    written(lambda m, x: torch.addmm(m.b, x, m.b.diag()), b=bias),
    rows(4),
    slices=NO_RULE,
)
add("lerp-of-one", written(lambda m, x: torch.lerp(m.b * x, m.b, m.b.sigmoid()), b=bias), rows(4))
add("halves-of-one", written(lambda m, x: F.layer_norm(x, (4,), m.w[:4], m.w[4:]), w=(8,)), rows(4))
add("overlapping-slices", written(lambda m, x: F.layer_norm(x, (4,), m.w[:4], m.w[2:6]), w=(8,)), rows(4))
add("bias-slice-of-weight", written(lambda m, x: F.linear(x, m.w[:, :4], m.w[:, 4]), w=(5, 5)), rows(4))
add("raw-in-three-places", written(lambda m, x: F.linear(x * m.b + m.b, m.b.diag(), m.b), b=bias), rows(4))
