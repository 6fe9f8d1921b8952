"""The engine of compiled models, against one torch.autograd.grad per cluster of the model as written."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from exactness import CLUSTERS, Given, K, assert_exact, sample_losses
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffmtl_fast as dm
from benchmarks.models import DiT
from benchmarks.reference import cluster_gradients

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Mixed(nn.Module):
    """Every kind of use of a parameter: layers, tables, tied and derived weights, a token, one layer twice."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.label = nn.Embedding(5, 8)
        self.position, self.token = nn.Parameter(torch.randn(1, 16, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.twice, self.tied = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.tied.weight = self.twice.weight
        self.table = nn.Parameter(torch.randn(6, 8))
        self.direction, self.length = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8, 1) + 0.5)
        self.rms, self.layer = nn.RMSNorm(8), nn.LayerNorm(8)
        self.head = nn.Conv1d(8, 2, 2, stride=2, groups=2)
        if frozen:
            for p in (*self.norm.parameters(), self.twice.bias, self.table):
                p.requires_grad_(False)

    def forward(self, x, y):
        h = F.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2) + self.position
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h, self.token.expand(h.shape[0], -1, -1)], 1)
        shift, scale, gate = (self.table[None, :3] + self.label(y)[:, None]).chunk(3, dim=1)
        h = h + gate * self.tied(self.twice(F.gelu(self.twice(self.layer(h))))) * (1 + scale) + shift
        weight = self.length * self.direction / self.direction.norm(dim=1, keepdim=True)
        h = F.linear(self.rms(h), weight) @ (self.direction * 2)
        return self.head(h.transpose(1, 2))


def make(device, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Mixed(**options).to(device, dtype)
    size = len(CLUSTERS["sorted"])
    return (
        model,
        torch.randn(size, 3, 4, 4, device=device, dtype=dtype),
        torch.arange(size, device=device) % 5,
    )


def engine_of(mtl: dm.ClusteredMTL) -> str:
    return mtl._engine._told.partition(":")[0]


def compiled(model, **options):
    return torch.compile(model, **({"backend": "aot_eager", "fullgraph": True} | options))


@pytest.mark.parametrize("clusters", CLUSTERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_use_of_a_parameter(clusters, frozen, device):
    (model, *inputs), (plain, *_) = make(device, frozen=frozen), make(device, frozen=frozen)
    mtl = assert_exact(compiled(model), *inputs, cluster=CLUSTERS[clusters], plain=plain)
    assert engine_of(mtl) == "compiled"


def test_with_the_default_backend(device):
    """In the mode that makes CUDA graphs where there is CUDA: they write into the Jacobian's own memory."""
    (model, *inputs), (plain, *_) = make(device, torch.float32), make(device, torch.float32)
    fast = compiled(model, backend="inductor", mode="reduce-overhead")
    mtl = assert_exact(fast, *inputs, plain=plain, rtol=1e-4, steps=4)
    assert engine_of(mtl) == "compiled"
    for stand_in, block in zip(mtl._engine.compiled._passes[0], mtl._engine.jacobian.blocks, strict=True):
        assert stand_in.block is block
        assert block._dynamo_static_input_type == stand_in.value._dynamo_static_input_type == "unguarded"
    if device.type == "cuda":
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def test_autocast(device):
    (model, *inputs), (plain, *_) = make(device, torch.float32), make(device, torch.float32)
    mtl = assert_exact(
        compiled(model),
        *inputs,
        plain=plain,
        rtol=0.1,
        context=lambda: torch.autocast(device.type, torch.bfloat16),
    )
    assert engine_of(mtl) == "compiled"


def test_other_clusters_are_no_reason_to_compile_again(device):
    model, *inputs = make(device)
    plain = copy.deepcopy(model)
    clusters = [
        [0, 0, 1, 2, 2, 2],
        [0, 1, 1, 1, 1, 2],
        [2, 0, 2, 1, 0, 2],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 2, 2, 2],
    ]
    mtl = assert_exact(compiled(model), *inputs, cluster=clusters[:2], plain=plain)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1
    step(mtl, inputs, clusters[2:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def step(mtl, inputs, clusters):
    for cluster in clusters:
        mtl.backward(sample_losses(mtl(*inputs, cluster=torch.tensor(cluster, device=inputs[0].device))))


def test_other_batch_sizes_with_dynamic_shapes(device):
    model, x, y = make(device)
    plain = copy.deepcopy(model)
    mtl = dm.ClusteredMTL(compiled(model, dynamic=True), K, Given())
    graphs = []
    for size in (6, 5, 4, 3):
        cluster = torch.arange(size, device=device) % K
        model.zero_grad()
        mtl.backward(sample_losses(mtl(x[:size], y[:size], cluster=cluster)))
        jacobian = cluster_gradients(
            sample_losses(plain(x[:size], y[:size])), cluster, list(plain.parameters()), K
        ).jacobian
        torch.testing.assert_close(mtl.last.gramian, jacobian @ jacobian.T, rtol=1e-8, atol=1e-10)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert engine_of(mtl) == "compiled"
    assert graphs[1:] == graphs[1:2] * 3


class Blocks(nn.Module):
    """Blocks that may be checkpointed, with dropout."""

    def __init__(self, reentrant: bool | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
            for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            inner = block if self.reentrant is None else _checkpointed(block, self.reentrant)
            x = x + inner(x)
        return x


def _checkpointed(block, reentrant):
    return lambda x: checkpoint(block, x, use_reentrant=reentrant)


@pytest.mark.parametrize("how", ["whole", "blocks", "checkpointed", "checkpointed blocks"])
def test_parts_and_checkpoints(how, device):
    if how == "checkpointed blocks" and torch.__version__ < "2.10":
        pytest.skip("PyTorch 2.9 itself fails to recompute such a model compiled with fullgraph=True")
    torch.manual_seed(0)
    model = Blocks(False if "checkpointed" in how else None).to(device).double()
    plain = copy.deepcopy(model)
    x = torch.randn(6, 8, dtype=torch.float64, device=device)
    if "blocks" in how:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        wrapped = model
    else:
        wrapped = compiled(model)
    assert engine_of(assert_exact(wrapped, x, plain=plain)) == "compiled"


class Normed(nn.Module):
    """A convolution, normalised; PyTorch's kernel for channels_last fails on inputs without gradient."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, out, 1), nn.GroupNorm(2, out)

    def forward(self, x):
        return F.silu(self.norm(self.conv(x)))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_group_norms_of_varying_channels(order, device):
    """Blocks of one code: the compiler makes the number of channels symbolic."""
    torch.manual_seed(0)
    model = nn.Sequential(Normed(4, 8), Normed(8, 12), Normed(12, 4)).to(device).double()
    plain = copy.deepcopy(model)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 4, 3, 2, dtype=torch.float64, device=device).to(memory_format=order)
    assert engine_of(assert_exact(model, x, plain=plain)) == "compiled"


def test_dropout_keeps_to_its_samples(device):
    """The update is that of the masks that the forward drew: a Gramian of equal samples in all clusters tells."""
    torch.manual_seed(0)
    model = Blocks(None, dropout=0.5).to(device).double()
    mtl = dm.ClusteredMTL(compiled(model), K, dm.Equal())
    mtl.measure_gramian = True
    x = torch.randn(6, 8, dtype=torch.float64, device=device)
    output = mtl(x, cluster=torch.tensor([0, 0, 1, 1, 2, 2], device=device))
    mtl.backward(sample_losses(output))
    found = [p.grad.clone() for p in model.parameters()]
    assert engine_of(mtl) == "compiled"
    assert all(g.isfinite().all() and g.any() for g in found)


def test_forwards_that_share_a_backward(device):
    model, x, y = make(device)
    plain = copy.deepcopy(model)
    mtl = dm.ClusteredMTL(compiled(model), K, Given())
    cluster = torch.tensor([2, 0, 2, 1, 0, 2], device=device)
    for _ in range(2):
        model.zero_grad()
        loss = sample_losses(mtl(x, y, cluster=cluster)) + sample_losses(mtl(x.flip(3), y, cluster=cluster))
        mtl.backward(loss)
    losses = sample_losses(plain(x, y)) + sample_losses(plain(x.flip(3), y))
    jacobian = cluster_gradients(losses, cluster, list(plain.parameters()), K).jacobian
    torch.testing.assert_close(mtl.last.gramian, jacobian @ jacobian.T, rtol=1e-8, atol=1e-10)


def test_backwards_that_share_an_update(device):
    """Within no_sync the Jacobian keeps what the backwards before have left there."""
    model, x, y = make(device)
    plain = copy.deepcopy(model)
    mtl = dm.ClusteredMTL(compiled(model), K, Given())
    cluster = torch.tensor([2, 0, 2, 1, 0, 2], device=device)
    for _ in range(2):
        model.zero_grad()
        with mtl.no_sync():
            mtl.backward(sample_losses(mtl(x, y, cluster=cluster)))
        mtl.backward(sample_losses(mtl(x.flip(3), y, cluster=cluster)))
    losses = torch.cat([sample_losses(plain(x, y)), sample_losses(plain(x.flip(3), y))])
    jacobian = cluster_gradients(losses, cluster.repeat(2), list(plain.parameters()), K).jacobian
    torch.testing.assert_close(mtl.last.gramian, jacobian @ jacobian.T, rtol=1e-8, atol=1e-10)


def test_any_other_backward_is_the_plain_models(device):
    model, *inputs = make(device)
    plain = copy.deepcopy(model)
    mtl = dm.ClusteredMTL(compiled(model), K, dm.PCGrad())
    cluster = torch.tensor(CLUSTERS["sorted"], device=device)
    step(mtl, inputs, [CLUSTERS["sorted"]])
    model.zero_grad()
    sample_losses(mtl(*inputs, cluster=cluster)).sum().backward()
    sample_losses(plain(*inputs)).sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_a_plain_backward_after_that_of_another_forward(device):
    """What a weight that is used twice has left in its block is not taken for the first forward's."""
    model, x, y = make(device)
    plain = copy.deepcopy(model)
    mtl = dm.ClusteredMTL(compiled(model), K, dm.PCGrad())
    cluster = torch.tensor(CLUSTERS["sorted"], device=device)
    for _ in range(2):
        first, second = mtl(x, y, cluster=cluster), mtl(x.flip(3), y, cluster=cluster)
        mtl.backward(sample_losses(second))
        model.zero_grad()
        sample_losses(first).sum().backward()
    sample_losses(plain(x, y)).sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_a_plain_backward_that_would_write_over_accumulated_gradients(device):
    model, x, y = make(device)
    mtl = dm.ClusteredMTL(compiled(model), K, dm.PCGrad())
    cluster = torch.tensor(CLUSTERS["sorted"], device=device)
    with mtl.no_sync():
        first, second = mtl(x, y, cluster=cluster), mtl(x.flip(3), y, cluster=cluster)
        mtl.backward(sample_losses(second))
        with pytest.raises(RuntimeError, match="write over"):
            sample_losses(first).sum().backward()


def test_the_memory_of_a_measured_step_is_given_back(device):
    model, *inputs = make(device)
    mtl = dm.ClusteredMTL(compiled(model), K, dm.Equal())
    cluster = torch.tensor(CLUSTERS["sorted"], device=device)
    mtl.measure_gramian = True
    mtl.backward(sample_losses(mtl(*inputs, cluster=cluster)) + sample_losses(mtl(*inputs, cluster=cluster)))
    engine = mtl._engine
    assert engine._jacobian is None
    assert not engine.compiled._passes
    step(mtl, inputs, [CLUSTERS["sorted"]])
    assert mtl.last.gramian is not None


def test_one_argument_compiles_the_model(device, caplog):
    model, *inputs = make(device)
    caplog.set_level(logging.INFO, "diffmtl_fast")
    mtl = dm.ClusteredMTL(model, K, Given(), compile={"backend": "aot_eager"})
    step(mtl, inputs, [CLUSTERS["unsorted"]])
    assert "ClusteredMTL: compiled engine for K = 3" in caplog.text
    assert not any("_orig_mod" in name for name in mtl.state_dict())


def test_lean_memory_is_refused(device):
    model, *inputs = make(device)
    mtl = dm.ClusteredMTL(compiled(model), K, Given(), memory="lean")
    with pytest.raises(ValueError, match="memory='lean': expected a model that is not compiled"):
        mtl(*inputs, cluster=torch.tensor(CLUSTERS["sorted"], device=device))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        h = self.layer(x)
        return h + h.mean(0)


def test_samples_that_mix_are_refused(device):
    mtl = dm.ClusteredMTL(compiled(Mixing().to(device)), K, Given())
    with pytest.raises(ValueError, match="others' rows change it"):
        mtl(torch.randn(6, 4, device=device), cluster=torch.tensor(CLUSTERS["sorted"], device=device))


class Unruled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Bilinear(4, 4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.layer(x, x)


def test_without_a_rule_the_model_runs_in_slices(device):
    torch.manual_seed(0)
    model = Unruled().to(device).double()
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    mtl = assert_exact(compiled(model, fullgraph=False), x, plain=copy.deepcopy(model))
    assert engine_of(mtl) == "sliced"
    assert "no rule for bilinear" in mtl._engine._told


class Attending(nn.Module):
    """Self attention, masked and not, and cross attention to more tokens of another width."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(4, 2, dropout, batch_first=True)
        self.other = nn.MultiheadAttention(4, 2, dropout, kdim=6, vdim=6)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)

    def forward(self, x, context, padded):
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype, device=x.device)
        x = x + self.own(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
        x = x + self.own(x, 2 * x, x, average_attn_weights=False)[0]
        kept = context.transpose(0, 1)
        update, shares = self.other(x.transpose(0, 1), kept, kept, key_padding_mask=padded)
        return self.layer(x + update.transpose(0, 1) * shares.square().sum(-1, keepdim=True))


def test_attention(device):
    torch.manual_seed(0)
    model = Attending().to(device).double()
    x, context = torch.randn(6, 3, 4, device=device).double(), torch.randn(6, 5, 6, device=device).double()
    padded = torch.arange(5, device=device) > torch.arange(6, device=device).unsqueeze(1) + 1
    mtl = assert_exact(compiled(model), x, context, padded, plain=copy.deepcopy(model))
    assert engine_of(mtl) == "compiled"


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(16, 8, (2, 3), stride=2, padding=1, output_padding=1, groups=2)
        self.last = nn.ConvTranspose1d(8, 3, 3, dilation=2, bias=False)

    def forward(self, x):
        return self.last(F.silu(self.first(x)).flatten(2))


def test_transposed_convolutions(device):
    torch.manual_seed(0)
    model = Upsampling().to(device).double()
    x = torch.randn(6, 16, 4, 3, dtype=torch.float64, device=device)
    mtl = assert_exact(compiled(model), x, plain=copy.deepcopy(model))
    assert engine_of(mtl) == "compiled"


class Growing(nn.Module):
    """Calls a layer more often from one step on, of which no check tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), [1]

    def forward(self, x):
        for _ in range(self.calls[0]):
            x = F.silu(self.layer(x))
        return x


def test_what_is_compiled_anew_is_checked_anew(device):
    model = Growing().to(device).double()
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    mtl = dm.ClusteredMTL(compiled(model), K, Given())
    for calls in (1, 2, 3, 1):
        model.calls[0] = calls
        assert_step_is_exact(mtl, model, x)
    assert engine_of(mtl) == "compiled"


def assert_step_is_exact(mtl, model, x, cluster=(2, 0, 2, 1, 0, 2)):
    cluster = torch.tensor(cluster, device=x.device)
    mtl.backward(sample_losses(mtl(x, cluster=cluster)))
    plain = copy.deepcopy(model)
    jacobian = cluster_gradients(sample_losses(plain(x)), cluster, list(plain.parameters()), K).jacobian
    torch.testing.assert_close(mtl.last.gramian, jacobian @ jacobian.T, rtol=1e-8, atol=1e-10)


class Table(nn.Module):
    """Applies a layer to a constant table, which may have as many rows as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.of_table, self.rows = nn.Linear(4, 4), nn.Linear(4, 4), [7]

    def forward(self, x):
        table = torch.cos(torch.arange(4 * self.rows[0], dtype=x.dtype, device=x.device)).view(-1, 4)
        return self.layer(x) + self.of_table(table).sin()[:5].mean(0)


def test_a_constant_that_comes_to_look_like_a_batch(device):
    model = Table().to(device).double()
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    mtl = dm.ClusteredMTL(compiled(model), K, Given())
    for rows in (7, 12):
        model.rows[0] = rows
        assert_step_is_exact(mtl, model, x)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError


def test_a_backward_that_fails_leaves_nothing_behind(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(device).double()
    for layer in model:
        layer.compile(backend="aot_eager")
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    mtl = dm.ClusteredMTL(model, K, Given())
    assert_step_is_exact(mtl, model, x)
    cluster = torch.tensor([2, 0, 2, 1, 0, 2], device=device)
    first, second = mtl(x, cluster=cluster), mtl(2 * x, cluster=cluster)
    with pytest.raises(MemoryError):
        mtl.backward(sample_losses(first) + sample_losses(Failing.apply(second)))
    assert_step_is_exact(mtl, model, 2 * x)


@pytest.mark.parametrize("same", [True, False])
def test_a_checkpoint_is_recomputed_for_its_own_batch(same, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)).to(
        device
    )
    model.double()
    model[2].compile(backend="aot_eager")
    inner = model[1].forward
    model[1].forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    x = torch.randn(6, 4, dtype=torch.float64, device=device)
    mtl = dm.ClusteredMTL(model, K, Given())
    other = mtl if same else dm.ClusteredMTL(compiled(nn.Linear(4, 4).to(device).double()), K, Given())
    cluster = torch.tensor([2, 0, 2, 1, 0, 2], device=device)
    losses = sample_losses(mtl(x, cluster=cluster))
    other(x, cluster=torch.tensor([0, 0, 0, 1, 1, 2], device=device))
    mtl.backward(losses, cluster)
    jacobian = cluster_gradients(sample_losses(model(x)), cluster, list(model.parameters()), K).jacobian
    torch.testing.assert_close(mtl.last.gramian, jacobian @ jacobian.T, rtol=1e-8, atol=1e-10)


def test_a_diffusion_transformer(device):
    torch.manual_seed(0)
    model = DiT(width=24, depth=2).to(device).double()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64, device=device)
    mtl = assert_exact(compiled(model), x, torch.arange(6, device=device), plain=copy.deepcopy(model))
    assert engine_of(mtl) == "compiled"


def test_losses_alone_add_no_graph_break(device):
    """The part of a step behind the model, with uncertainty weighting, compiles as one graph."""
    weighting = dm.UncertaintyWeighting(K).to(device)

    def objective(output, target, cluster):
        losses = dm.ops.cluster_mean(dm.ops.sample_mse(output, target), cluster, K)
        return weighting(losses[0] if isinstance(losses, tuple) else losses)

    output, target = torch.randn(2, 6, 8, device=device).unbind()
    cluster = torch.tensor(CLUSTERS["sorted"], device=device)
    run = torch.compile(objective, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(output, target, cluster), objective(output, target, cluster))
