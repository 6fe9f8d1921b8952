"""A step, once its checks are over, waits for the accelerator nowhere.

On a GPU PyTorch refuses every wait itself; elsewhere `tests/accelerator.py` stands in for one and notes them.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffmtl_fast as dm
from diffmtl_fast.train import loop
from diffmtl_fast.train.config import PLAIN
from diffmtl_fast.train.history import History
from diffmtl_fast.train.loop import Trainer
from tests.accelerator import DEVICE, Accelerator, accelerator


@pytest.fixture
def there(device, monkeypatch):
    """A GPU, or what stands in for one."""
    if device.type == "cuda":
        yield device
        return
    with accelerator(monkeypatch):
        yield DEVICE


#: The step's one synchronisation where the host does not know the clusters.
READ = "gradients/batch.py _sort: _local_scalar_dense"


@contextmanager
def no_waits(device, but=None):
    """Refuse what the host would wait for the accelerator for, `but` for what comes from one place."""
    if device.type == "cuda":
        if but is not None:
            pytest.skip(f"waits in {but}")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    waits = Accelerator.current.waits
    waits.clear()
    yield
    assert set(waits) == ({but} if but else set()), waits


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


READERS = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "index": lambda x: [0, 1][x[0].long()],
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "gradient": lambda x: _Reading.apply(x.clone().requires_grad_()).sum().backward(),
    "made of a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "pageable": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "pinned, but waited for": lambda x: torch.ones(2).pin_memory().to(x.device),
    "copied into": lambda x: x.copy_(torch.ones(2)),
    "indices of the host": lambda x: x[torch.tensor([1])],
    "a list of indices": lambda x: x[[1, 0]],
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x.diag()),
    "solved": lambda x: torch.linalg.solve((x + 1).diag(), x),
    "drawn by weight": lambda x: x.multinomial(1),
}


@pytest.mark.parametrize("name", READERS)
def test_waits_are_found(name, there):
    x = torch.arange(2, 0, -1, device=there).float() - 1  # 1, 0
    with pytest.raises((AssertionError, RuntimeError)), no_waits(there):
        READERS[name](x)


def test_what_is_no_wait_is_none(there):
    x = torch.arange(2, device=there).float()
    with no_waits(there):
        torch.ones(2).pin_memory().to(there, non_blocking=True)
        x[torch.arange(1, device=there)] += torch.tensor(
            3.0
        )  # a number of the host's goes along with the launch
        torch.linalg.cholesky_ex(torch.eye(2, device=there))
        x.repeat_interleave(torch.ones_like(x).long(), output_size=2)


def test_operands_on_two_devices_are_refused(there):
    with pytest.raises(
        RuntimeError, match=r"expected all tensors to be on the same device|Expected all tensors"
    ):
        torch.ones(2, device=there) + torch.ones(2)


class Denoiser(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.time = nn.Embedding(20, 8)
        self.conv, self.norm, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 1)
        self.shift = nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x, t):
        return checkpoint(self.denoise, x, t, use_reentrant=False) if self.recompute else self.denoise(x, t)

    def denoise(self, x, t):
        h = self.norm(self.conv(x) + self.time(t)[:, :, None, None]) + self.shift
        return self.last(h.relu().movedim(1, -1)).movedim(-1, 1)


def plain_step(mtl, noise, t, cluster):
    mtl.backward(dm.ops.sample_mse(mtl(noise + 1, t, cluster=cluster), noise))


def measured_step(mtl, noise, t, cluster):
    mtl.measure_gramian = True
    plain_step(mtl, noise, t, cluster)
    assert mtl.last.cosines.shape == (5, 5)
    assert mtl.last.conflicts.shape == ()


def clipped_step(mtl, noise, t, cluster):
    plain_step(mtl, noise, t, cluster)
    torch.nn.utils.clip_grads_with_norm_(mtl.parameters(), 1.0, mtl.last.grad_norm)


def self_conditioned_step(mtl, noise, t, cluster):
    with torch.no_grad():
        guess = mtl(noise, t)
    losses = [dm.ops.sample_mse(mtl(noise + i * guess, t, cluster=cluster), noise) for i in range(2)]
    mtl.backward(sum(losses) / 2)


def accumulated_step(mtl, noise, t, cluster):
    with mtl.no_sync():
        plain_step(mtl, noise, t, cluster)
    plain_step(mtl, noise, t, cluster)


def one_cluster_step(mtl, noise, t, cluster):
    whole = dm.cluster_timesteps(20, 1).sample(len(noise), device=noise.device)[1]
    plain_step(mtl, noise, t, whole)


WAYS = {
    **{(name, way): {} for name in dm.weighting.METHODS for way in ("full",)},
    **{(name, "lean"): {"memory": "lean"} for name in ("uw", "pcgrad", "nash")},
    **{(name, "sliced"): {"engine": "sliced"} for name in ("uw", "pcgrad", "nash")},
    **{(name, "drop"): {"drop_nonfinite": True} for name in ("uw", "pcgrad")},
    ("pcgrad", "half"): {"jacobian_dtype": torch.bfloat16},
}
STEPS = {
    "measured": ("uw", measured_step, {}),
    "clipped": ("pcgrad", clipped_step, {}),
    "self-conditioned": ("pcgrad", self_conditioned_step, {}),
    "self-conditioned, lean": ("pcgrad", self_conditioned_step, {"memory": "lean"}),
    "accumulated": ("pcgrad", accumulated_step, {}),
    "one cluster": ("pcgrad", one_cluster_step, {}),
    "recomputed": ("pcgrad", plain_step, {"recompute": True}),
    "recomputed, lean": ("pcgrad", plain_step, {"recompute": True, "memory": "lean"}),
}


def train(method, there, options, step):
    options = dict(options)
    weighting = dm.weighting.METHODS[method].build(5, there, 0)
    model = Denoiser(options.pop("recompute", False)).to(there)
    clusters = dm.cluster_timesteps(20, 5)
    mtl = dm.ClusteredMTL(model, num_clusters=5, weighting=weighting, **options)
    optimizer = torch.optim.AdamW(dm.param_groups(model, weighting, lr=1e-4, weight_decay=0.0))

    def iterate():
        noise = torch.randn(12, 1, 4, 4, device=there)
        optimizer.zero_grad()
        step(mtl, noise, *clusters.sample(12, device=there))
        optimizer.step()

    for _ in range(2):  # with the checks of the first steps
        iterate()
    with no_waits(there):
        for _ in range(2):
            iterate()


@pytest.mark.parametrize(("method", "way"), WAYS, ids=["-".join(way) for way in WAYS])
def test_the_loop_of_the_readme(method, way, there):
    train(method, there, WAYS[method, way], plain_step)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_another_kind(name, there):
    method, step, options = STEPS[name]
    train(method, there, options, step)


def test_a_scaler_is_waited_for_where_the_step_reads_overflows(there):
    """GradScaler reads one flag itself, in its step; before that the Gramian and the norm are read, once each."""
    if there.type == "cuda":
        pytest.skip("scalers wait")
    mtl = dm.ClusteredMTL(Denoiser().to(there), num_clusters=5, weighting=dm.PCGrad())
    optimizer = torch.optim.SGD(mtl.parameters(), 0.1)
    scaler = torch.amp.GradScaler(there.type, init_scale=16.0)
    clusters = dm.cluster_timesteps(20, 5)
    for _ in range(3):
        Accelerator.current.waits.clear()
        t, cluster = clusters.sample(12, device=there)
        noise = torch.randn(12, 1, 4, 4, device=there)
        optimizer.zero_grad()
        mtl.backward(dm.ops.sample_mse(mtl(noise + 1, t, cluster=cluster), noise), scaler=scaler)
        ours = Counter(Accelerator.current.waits)
        scaler.step(optimizer)
        scaler.update()
    readers = ("_weigh", "_undone_where_skipped")
    assert ours == {f"gradients/clustered.py {name}: _local_scalar_dense": 1 for name in readers}
    assert {place.split(":")[0] for place in Accelerator.current.waits - ours} == {"outside"}


@pytest.mark.parametrize("cut", [False, True])
def test_clusters_that_the_host_does_not_know_are_read_once(there, cut):
    mtl = dm.ClusteredMTL(Denoiser().to(there), num_clusters=5, weighting=dm.PCGrad())
    noise, cluster = torch.randn(12, 1, 4, 4, device=there), torch.arange(12, device=there) * 5 // 12
    for _ in range(3):
        seen = cluster[:10] if cut else cluster
        if there == DEVICE:
            Accelerator.current.waits.clear()
        plain_step(mtl, noise[: len(seen)], seen, seen)
    if there == DEVICE:
        assert Accelerator.current.waits == {READ: 1}


UNCONDITIONED = {"conditioning": {"dropout": 0.5}, "model": {"args": {"num_class_embeds": 11}}}
RUNS = [
    {"method": PLAIN},
    {"method": PLAIN, "process": "edm"},
    {"method": "uw", "process": "flow"},
    {"method": "pcgrad"},
    {"method": "famo", "optimizer": {"clip": 1.0}, "accumulate": 2},
    {"method": "nash", "optimizer": {"clip": 1.0}, "compute": {"memory": "lean"}},
    {"method": "nash", "optimizer": {"clip": 1.0}, "compute": {"engine": "sliced"}},
    {"method": "uw", "loss": {"nonfinite": "drop"}},
    {"method": "uw", **UNCONDITIONED},
    {"method": "uw", "precision": "bf16", "sigma_rels": [0.1], "optimizer": {"clip": 1.0}},
    {"method": "nash", "precision": "bf16", "logging": {"every": 3, "cosines_every": 3}},
    {"method": "pcgrad", "accumulate": 2, "weigh_per": "step"},
    {"method": "aligned_mtl", "optimizer": {"clip": 1.0}},
    {"method": "continuous_uw"},
    *(
        {"method": PLAIN, "timesteps": {"sampler": s}}
        for s in ("second_moment", "loss", "speed", "stratified")
    ),
    {"method": "pcgrad", "timesteps": {"sampler": "range", "args": {"min_timestep": 3}}},
    {"method": "uw", "timesteps": {"sampler": "logit_normal"}},
    {"method": PLAIN, "curriculum": {"order": "easy_to_hard"}},
    {"method": "uw", "curriculum": {"order": "easy_to_hard"}, "loss": {"nonfinite": "drop"}},
]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_a_step_of_the_trainer(tiny, tmp_path, changes, there, monkeypatch):
    if there == DEVICE:
        own = loop.batches

        def batches(*args, pin, **options):
            return (batch.pin_memory() if pin else batch for batch in own(*args, **options))

        monkeypatch.setattr(loop, "resolve_device", torch.device)
        monkeypatch.setattr(loop, "batches", batches)
    trainer = Trainer(tiny(**changes, device=str(there)))
    history = History(tmp_path / "log.jsonl")
    for _ in range(2):
        trainer.step(history)
    # Clusters that depend on losses are drawn on the device, and read where gradients are formed by cluster.
    by_cluster = trainer.timesteps.follows_losses and trainer.config.loss.nonfinite == "drop"
    with no_waits(there, READ if by_cluster else None):
        for _ in range(2):
            trainer.step(history)
    if there == DEVICE:  # a line of the log is what waits, in its own functions
        Accelerator.current.waits.clear()
        history.flush(trainer.iteration)
        assert {place.split(":")[0] for place in Accelerator.current.waits} <= {
            f"train/history.py {name}" for name in ("check", "_plain", "_masked_mean", "flush")
        }
        assert Accelerator.current.waits
    history.close()
