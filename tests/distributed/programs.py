"""What the ranks do in these tests, and the same in one process."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import diffmtl_fast as dm
from benchmarks.reference import cluster_gradients
from diffmtl_fast.distributed.buckets import Departures

K = 5
#: by name, the clusters of the samples of every rank, for two ranks and for four
LAYOUTS = {
    "sorted": [[0, 1, 2, 2, 3, 4], [0, 0, 1, 2, 3, 3, 4], [0, 1, 2, 3, 4], [0, 1, 1, 2, 3, 4, 4, 4]],
    "unequal and unsorted": [
        [4, 0, 2, 1, 3, 2, 2],
        [1, 3, 0, 4],
        [2, 1, 0, 0, 3, 4, 4, 1, 1],
        [3, 0, 2, 4, 1],
    ],
    "absent on ranks": [[2, 0, 2, 0], [4, 1, 3, 1, 0, 4, 3], [2, 2, 1], [3]],
    "absent on all": [[0, 4, 1, 0], [1, 1, 4, 0, 0, 4], [0, 1], [4, 4, 4]],
}
#: the same in cluster-parallel training: one cluster a rank, of several ranks, a few a rank
PARALLEL = {
    "one": [[4, 4, 4], [1, 1], [0, 0, 0, 0], [2]],
    "shared": [[3, 3], [3, 3, 3], [1], [3]],
    "several": [[4, 0, 2, 0], [1, 3, 1], [0], [2, 2, 4]],
}


class Denoiser(nn.Module):
    """Parameters of several kinds: of linear layers, a norm, an embedding, raw, frozen, seldom and never used."""

    def __init__(self, width: int = 21) -> None:
        super().__init__()
        self.time, self.first = nn.Embedding(50, width), nn.Linear(6, width)
        self.norm, self.hidden = nn.LayerNorm(width), nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.unused = nn.Parameter(torch.ones(3))
        self.rare = nn.Parameter(torch.ones(width))  # used where a sample is of cluster 4
        self.last = nn.Linear(width, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x) + self.time(t))
        hidden = hidden + self.frozen(self.hidden(self.norm(hidden))) * self.gain
        late = (t >= 40).unsqueeze(1)
        if bool(late.any()):
            hidden = torch.where(late, hidden * self.rare, hidden)
        return self.last(hidden)


def make_model(dtype: torch.dtype, seed: int = 0, width: int = 21) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(width).to(dtype)


@dataclass
class Batch:
    x: Tensor
    t: Tensor
    target: Tensor
    cluster: Tensor


def batches(
    layout: str | Sequence[Sequence[int]], ranks: int, dtype: torch.dtype, seed: int = 0
) -> list[Batch]:
    """Return every rank's samples, whose clusters want different things."""
    made = []
    generator = torch.Generator().manual_seed(seed)
    clusters = LAYOUTS[layout][:ranks] if isinstance(layout, str) else layout
    for members in clusters:
        cluster = torch.tensor(members, dtype=torch.int64)
        noise = torch.randn(len(cluster), 6, generator=generator)
        x = noise + torch.randn(len(cluster), 6, generator=generator)
        target = noise * torch.where(cluster % 2 == 0, 1.0, -1.0).unsqueeze(1)
        made.append(Batch(x.to(dtype), cluster * 10 + 3, target.to(dtype), cluster))
    return made


def joined(parts: Sequence[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(p, n) for p in parts]) for n in ("x", "t", "target", "cluster")))


class FixedOrder(dm.PCGrad):
    """PCGrad whose orders are no matter of chance."""

    def draw_order(self, k: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.stack([torch.tensor([j for j in range(k) if j != i][:: (-1) ** i]) for i in range(k)])


def make_weighting(name: str, rank: int = 0) -> nn.Module:
    if name == "uw":
        weighting = dm.UncertaintyWeighting(K)
        with torch.no_grad():
            weighting.log_var.copy_(torch.linspace(-1, 1, K))
        return weighting
    if name == "random pcgrad":
        return dm.PCGrad(torch.Generator().manual_seed(rank))
    if name == "seldom nash":
        return dm.NashMTL(update_every=3)
    return {"equal": dm.Equal, "pcgrad": FixedOrder, "nash": dm.NashMTL}[name]()


@dataclass
class Outcome:
    """What a rank has after its steps."""

    grads: dict[str, Tensor | None]
    losses: Tensor
    weights: Tensor
    present: Tensor
    gramian: Tensor | None
    grad_norm: Tensor | None
    learned: list[Tensor | None]
    bytes_sent: float = 0
    messages: list[str] = field(default_factory=list)


def outcome(mtl: dm.ClusteredMTL, **more: Any) -> Outcome:
    last = mtl.last
    grads = {name: p.grad for name, p in mtl.module.named_parameters()}
    learned = [p.grad for p in mtl.weighting.parameters()]
    return Outcome(
        grads, last.losses, last.weights, last.present, last.gramian, last.grad_norm, learned, **more
    )


def step(mtl: dm.ClusteredMTL, batch: Batch, **kwargs: Any) -> None:
    if not len(batch.cluster):
        mtl.backward(None, **kwargs)
        return
    mtl.backward(dm.ops.sample_mse(mtl(batch.x, batch.t, cluster=batch.cluster), batch.target), **kwargs)


def train(
    layout: Any,
    weighting: str,
    dtype: torch.dtype = torch.float32,
    options: Sequence[dict[str, Any]] = ({},),
    backwards: int = 1,
    measure: bool = False,
    autocast: bool = False,
    seeds: Sequence[int] = (0, 0, 0, 0),
    width: int = 21,
    bucket: int | None = None,
    wrap: str = "",
    accumulate: bool = False,
    scaled: bool = False,
) -> Outcome:
    """Take a step of so many backwards on this rank; `options` of ClusteredMTL are of each rank, or of all."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model: nn.Module = make_model(dtype, seeds[rank], width)
    if wrap == "DistributedDataParallel":
        model = nn.parallel.DistributedDataParallel(model)
    if wrap == "compile":
        model = torch.compile(model, backend="eager")
    with ExitStack() as stack:
        counted = stack.enter_context(counting_bytes())
        messages = stack.enter_context(logged())
        if bucket is not None:
            stack.enter_context(mock.patch("diffmtl_fast.distributed.buckets.LIMIT", bucket))
        mtl = dm.ClusteredMTL(
            model, K, make_weighting(weighting, rank).to(dtype), **options[rank % len(options)]
        )
        mtl.measure_gramian = measure
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for number in range(backwards):
            if number == 1:
                counted["bytes"] = 0
            batch = batches(layout, ranks, dtype, seed=number)[rank]
            with ExitStack() as within:
                if autocast:
                    within.enter_context(torch.autocast("cpu", torch.bfloat16))
                if accumulate and number < backwards - 1:
                    within.enter_context(mtl.no_sync())
                step(mtl, batch, **({"scaler": scaler} if scaled else {}))
    if scaled:
        scaler.unscale_(torch.optim.SGD(model.parameters()))
        mtl.last = replace(mtl.last, grad_norm=mtl.last.grad_norm / scaler.get_scale())
    return outcome(mtl, bytes_sent=counted["bytes"], messages=messages)


def train_for_some_time(
    weighting: str, steps: int, overflow: tuple[int, int] | None = None, ranks: int | None = None
) -> dict[str, Tensor]:
    """Train by SGD, on this rank or, with the samples of so many ranks, alone; return the state in the end.

    With `overflow`, a GradScaler goes with it, and in that step the gradients of that rank's samples are infinite.
    """
    rank = None if ranks is not None else dist.get_rank()
    model, chosen = make_model(torch.float64), make_weighting(weighting).double()
    mtl = dm.ClusteredMTL(model, K, chosen)
    optimizer = torch.optim.SGD([*model.parameters(), *chosen.parameters()], lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=overflow is not None)
    before = parameters_to_vector(model.parameters()).detach().clone()
    taken = 0
    for number in range(steps):
        layout = list(LAYOUTS)[
            number % len(LAYOUTS)
        ]  # batches of new sizes are checked on one rank or the other
        parts = batches(layout, ranks or dist.get_world_size(), torch.float64, seed=number)
        batch = joined(parts) if rank is None else parts[rank]
        if overflow == (number, rank):
            batch.target[:] = 1e200
        optimizer.zero_grad()
        step(mtl, batch, **({} if overflow is None else {"scaler": scaler}))
        scaler.step(optimizer)
        scaler.update()
        now = parameters_to_vector(model.parameters()).detach().clone()
        taken += not torch.equal(before, now)
        before = now
    scale = torch.tensor(scaler.get_scale())
    return {
        **model.state_dict(),
        "weights": mtl.last.weights,
        "scale": scale,
        "steps taken": torch.tensor(taken),
    }


def expected(
    layout: Any,
    ranks: int,
    weighting: str,
    dtype: torch.dtype = torch.float32,
    backwards: int = 1,
    width: int = 21,
    accumulate: bool = False,
) -> Outcome:
    """Do the same in one process in float64, with one backward per cluster."""
    model = make_model(dtype, width=width).double()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    chosen = make_weighting(weighting).double()
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    each = [joined(batches(layout, ranks, dtype, seed=number)) for number in range(backwards)]
    for batch in [joined(each)] if accumulate else each:
        output = model(batch.x.double(), batch.t)
        losses = (output - batch.target.double()).square().mean(1)
        found = cluster_gradients(losses, batch.cluster, parameters, K)
        gramian, present = found.jacobian @ found.jacobian.T, found.present
        if isinstance(chosen, dm.weighting.LossWeighting):
            means = found.losses.requires_grad_()
            chosen(means, present).backward()
            weights = means.grad * present.sum()
        else:
            weights = chosen(gramian, present)
        total += (weights.detach() @ found.jacobian) / present.sum()
    grads = dict(zip(names, total.split([p.numel() for p in parameters]), strict=True))
    learned = [p.grad for p in chosen.parameters()]
    return Outcome(grads, found.losses.detach(), weights.detach(), present, gramian, total.norm(), learned)


def assert_exact(found: Sequence[Outcome], wanted: Outcome, tolerance: float) -> None:
    """Compare the ranks with each other, bit by bit, and the first one with one process."""
    first = found[0]
    for other in found[1:]:
        for name, grad in first.grads.items():
            theirs = other.grads[name]
            assert (grad is None) == (theirs is None), name
            assert grad is None or torch.equal(grad, theirs), name
        for name in ("losses", "weights", "present", "gramian", "grad_norm"):
            mine, theirs = getattr(first, name), getattr(other, name)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs), name
        for mine, theirs in zip(first.learned, other.learned, strict=True):
            assert torch.equal(mine, theirs)
    assert torch.equal(first.present, wanted.present)
    scale = torch.cat(list(wanted.grads.values())).abs().max()
    for name, grad in wanted.grads.items():
        mine = first.grads[name]
        mine = torch.zeros_like(grad) if mine is None else mine.double().flatten()
        assert (mine - grad).abs().max() <= tolerance * scale, name
    assert first.grads["unused"] is None
    assert relative(first.losses, wanted.losses) <= tolerance
    assert relative(first.weights, wanted.weights) <= 10 * tolerance
    if first.gramian is not None:
        assert relative(first.gramian, wanted.gramian) <= tolerance
        assert relative(first.grad_norm, wanted.grad_norm) <= tolerance
    for mine, theirs in zip(first.learned, wanted.learned, strict=True):
        assert relative(mine, theirs) <= tolerance


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def departures(layout: Any, weighting: str = "pcgrad", **options: Any) -> tuple[list[int], Outcome, Outcome]:
    """Take steps with small buckets; return how many left in the backward, and after it, and what came out.

    The second outcome is that of the same steps where all buckets wait for the end of the backward.
    """
    left = [0, 0]

    def counted(method: str, index: int) -> Any:
        plain = getattr(Departures, method)

        def call(self: Departures, *args: Any) -> None:
            before = self._sent
            plain(self, *args)
            left[index] += self._sent - before

        return mock.patch.object(Departures, method, call)

    def step_again() -> Outcome:
        left[:] = 0, 0
        return train(layout, weighting, bucket=2000, backwards=2, **options)

    with counted("complete", 0), counted("flush", 1):
        with mock.patch.object(Departures, "complete"):
            late = step_again()
        assert left[0] == 0
        early = step_again()
    return left, early, late


def copies() -> tuple[list[dict[str, Tensor | None]], str]:
    """Return the gradients of a wrapper with a process group, of its copy and of a pickled one, and an error."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch, found, error = batches("sorted", ranks, torch.float64)[rank], [], ""
    for group in (dist.new_group(list(range(ranks))), None):
        mtl = dm.ClusteredMTL(make_model(torch.float64), K, make_weighting("pcgrad"), process_group=group)
        step(mtl, batch)
        with pytest.raises(TypeError) if group is not None else nullcontext() as refused:
            other = pickle.loads(pickle.dumps(mtl))
        error = str(refused.value) if group is not None else error
        for each in (mtl, copy.deepcopy(mtl) if group is not None else other):
            each.zero_grad()
            step(each, batch)
            found.append(outcome(each).grads)
    return found, error


def clipped(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of a step, what PyTorch finds, and what is left after clipping by the former to its half."""
    mtl = dm.ClusteredMTL(make_model(torch.float64), K, make_weighting("pcgrad"))
    step(mtl, batches(layout, dist.get_world_size(), torch.float64)[dist.get_rank()])
    parameters, norm = list(mtl.module.parameters()), mtl.last.grad_norm
    theirs = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, 0.5 * float(norm), norm)
    return norm, theirs, nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Trouble(nn.Module):
    """Does something to one rank in forward or in backward: an error, death, a long sleep, mixed samples.

    Args:
        kind: what.
        rank: to whom.
    """

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__()
        self.kind = kind if rank == dist.get_rank() else ""
        self.inner = make_model(torch.float32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.kind == "error in forward":
            raise ValueError("a bad sample")
        if self.kind == "mixed samples":
            x = x - x.mean(0)
        return self.inner(x, t)


def stumble(kind: str, rank: int, weighting: str = "pcgrad", again: bool = False) -> tuple[str, float, Any]:
    """Take a step in which a rank has trouble; return the error, its time, and the gradients of another step."""
    batch = batches("sorted", dist.get_world_size(), torch.float32)[dist.get_rank()]
    model = Trouble(kind, rank)
    mtl = dm.ClusteredMTL(model, K, make_weighting(weighting))
    mine, model.kind = model.kind, ""
    step(mtl, batch)
    for p in model.parameters():
        p.grad = None
    model.kind = mine
    if model.kind == "mixed samples":
        batch = Batch(*(torch.cat([part, part]) for part in (batch.x, batch.t, batch.target, batch.cluster)))
    began, error = time.perf_counter(), ""
    try:
        output = mtl(batch.x, batch.t, cluster=batch.cluster)
        if mine == "error in backward":
            output.register_hook(_raise)
        if mine == "a loss for each element":
            output = output.flatten()
        if mine == "death":
            os._exit(1)
        if mine == "death in backward":
            output.register_hook(lambda gradient: os._exit(1))
        if mine == "sleep":
            time.sleep(8)
        if mine == "no memory":
            mtl._engine.store = _no_memory
        mtl.backward(dm.ops.sample_mse(output, batch.target.view(output.shape)))
    except (RuntimeError, ValueError) as found:
        error = f"{type(found).__name__}: {found}"
    took, after = time.perf_counter() - began, None
    if again:
        model.kind = ""
        batch = batches("sorted", dist.get_world_size(), torch.float32)[dist.get_rank()]
        left = [name for name, p in model.named_parameters() if p.grad is not None]
        assert not left, left
        step(mtl, batch)
        after = {name: p.grad for name, p in model.inner.named_parameters()}
    return error, took, after


def _no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("no room for the Jacobian")


def no_samples() -> str:
    """Take a step without samples on any rank; return the error."""
    mtl = dm.ClusteredMTL(make_model(torch.float32), K, make_weighting("pcgrad"))
    with pytest.raises(ValueError, match="loss") as error:
        mtl.backward(None)
    return str(error.value)


def mixing_model() -> Tensor:
    """Train a model with batch normalisation on the samples of one cluster; return the gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 6))
    mtl = dm.ClusteredMTL(model, K, make_weighting("pcgrad"))
    batch = batches(PARALLEL["one"][:2], 2, torch.float32)[dist.get_rank()]
    mtl.backward(dm.ops.sample_mse(mtl(batch.x, cluster=batch.cluster), batch.target))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def _raise(gradient: Tensor) -> None:
    raise RuntimeError("no such gradient")


def differ(kind: str) -> str:
    """Take a step with settings that are not those of the other ranks; return the error."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    last = rank == ranks - 1
    width = 22 if kind == "width" and last else 21
    weighting = dm.NashMTL() if kind == "weighting" and last else dm.PCGrad()
    options = {"jacobian_dtype": torch.bfloat16} if kind == "jacobian_dtype" and last else {}
    scale = 2.0 if kind == "scale" and last else 4.0
    if kind == "measure_gramian":
        weighting = dm.Equal()
    model = make_model(torch.float32, width=width)
    if kind == "frozen" and last:
        model.gain.requires_grad_(False)
    mtl = dm.ClusteredMTL(model, K + (kind == "num_clusters" and last), weighting, **options)
    mtl.measure_gramian = kind == "measure_gramian" and last
    batch = batches("sorted", ranks, torch.float32)[rank]
    with pytest.raises((ValueError, RuntimeError)) as error:
        step(mtl, batch, scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    return f"{error.type.__name__}: {error.value}"


class Holder(nn.Module):
    """A module that has a `ClusteredMTL` in it."""

    def __init__(self, mtl: dm.ClusteredMTL) -> None:
        super().__init__()
        self.mtl = mtl

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.mtl(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.mtl.backward(loss)


def refused(kind: str) -> str:
    """Set something up that several processes can't do; return the error."""
    options, batch = {}, batches("sorted", dist.get_world_size(), torch.float32)[dist.get_rank()]
    model, weighting = make_model(torch.float32), make_weighting("pcgrad")
    if kind == "lean":
        options["memory"] = "lean"
    if kind == "sparse":
        model.time, weighting = nn.Embedding(50, 21, sparse=True), make_weighting("uw")
    if kind == "group":
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        options["process_group"] = groups[(dist.get_rank() + 1) % len(groups)]
    if kind in ("around one process", "around it, unused parameters"):
        weighting = make_weighting("uw")
    if kind == "around one process":
        options["process_group"] = [dist.new_group([rank]) for rank in range(dist.get_world_size())][
            dist.get_rank()
        ]
    called = mtl = dm.ClusteredMTL(model, K, weighting, **options)
    if kind.startswith("around"):
        if kind == "around a module with it":
            mtl = Holder(mtl)
        unused = kind == "around it, unused parameters"
        called = nn.parallel.DistributedDataParallel(mtl, find_unused_parameters=unused)
    with pytest.raises((TypeError, ValueError)) as error:
        mtl.backward(dm.ops.sample_mse(called(batch.x, batch.t, cluster=batch.cluster), batch.target))
    return f"{error.type.__name__}: {error.value}"


def alone_in_a_group() -> tuple[float, Outcome]:
    """Take a step in a group of one's own; return the bytes sent and the outcome."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = [dist.new_group([each]) for each in range(ranks)][rank]
    batch = batches("sorted", ranks, torch.float64)[rank]
    mtl = dm.ClusteredMTL(make_model(torch.float64), K, make_weighting("pcgrad"), process_group=group)
    with counting_bytes() as counted:
        step(mtl, batch)
    dist.barrier()
    return counted["bytes"], outcome(mtl)


def bytes_of_a_forward() -> float:
    """Return what is exchanged in a forward after the first step, with all checks of a new size of batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mtl = dm.ClusteredMTL(make_model(torch.float32), K, make_weighting("pcgrad"))
    sorted_one, other = (
        batches(name, ranks, torch.float32)[rank] for name in ("sorted", "unequal and unsorted")
    )
    step(mtl, sorted_one)
    with logged() as messages, counting_bytes() as counted:
        mtl(other.x, other.t, cluster=other.cluster)
    assert any("checked the model on a batch" in line for line in messages)
    return counted["bytes"]


@contextmanager
def counting_bytes():
    """Count the bytes that a rank has to send, by the best algorithm of every collective (a ring)."""
    counted = {"bytes": 0.0}
    share = (dist.get_world_size() - 1) / dist.get_world_size()

    def size(tensors: Any) -> int:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        return sum(t.numel() * t.element_size() for t in tensors)

    def watched(name: str, factor: float, argument: int) -> Any:
        plain = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            counted["bytes"] += factor * share * size(args[argument])
            return plain(*args, **kwargs)

        return mock.patch.object(dist, name, collective)

    with (
        watched("all_reduce", 2, 0),
        watched("all_to_all_single", 1, 1),
        watched("all_gather", 1, 0),
        watched("broadcast", 1, 0),
    ):
        yield counted


@contextmanager
def logged():
    """Collect what the package logs."""
    messages: list[str] = []
    logger, handler = logging.getLogger("diffmtl_fast"), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
