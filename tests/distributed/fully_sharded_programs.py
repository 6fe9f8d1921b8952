"""What the ranks do with fully sharded models, and what that moves."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import programs
import pytest
import torch
import torch.distributed as dist
from programs import K, Outcome, batches, logged, make_model, make_weighting, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffmtl_fast as dm


def shard(model: nn.Module, kind: str = "fsdp", **options: Any) -> nn.Module:
    """Shard a denoiser over all ranks: its hidden layers in a group of their own."""
    from torch.distributed.fsdp import fully_shard

    size = dist.get_world_size()
    if kind == "hsdp":
        mesh = dist.init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = dist.init_device_mesh("cpu", (size,))
    for part in (model.hidden, model.first):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_outcome(mtl: dm.ClusteredMTL, **more: Any) -> Outcome:
    for module in mtl.module.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    found = programs.outcome(mtl, **more)
    found.grads = {name: whole(grad) for name, grad in found.grads.items()}
    return found


def train(
    layout: Any,
    weighting: str,
    dtype: torch.dtype = torch.float32,
    kind: str = "fsdp",
    backwards: int = 1,
    measure: bool = False,
    mtl_options: dict[str, Any] | None = None,
    seeds: Sequence[int] = (0, 0, 0, 0),
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    **options: Any,
) -> Outcome:
    """Take a step of so many backwards on this rank with a sharded model."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    rank, ranks = dist.get_rank(), dist.get_world_size()
    options["mp_policy"] = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    model = shard(make_model(dtype, seeds[rank]), kind, **options)
    with logged() as messages:
        mtl = dm.ClusteredMTL(model, K, make_weighting(weighting, rank).to(dtype), **mtl_options or {})
        mtl.measure_gramian = measure
        for number in range(backwards):
            step(mtl, batches(layout, ranks, dtype, seed=number)[rank])
    return whole_outcome(mtl, messages=messages)


def train_for_some_time(weighting: str, steps: int, overflow: int | None = None) -> dict[str, Tensor]:
    """Train by SGD on this rank; return the whole state in the end. See `programs.train_for_some_time`.

    With `overflow`, a GradScaler goes with it, and in that step the gradients of rank 1's samples are infinite.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, chosen = shard(make_model(torch.float64)), make_weighting(weighting).double()
    mtl = dm.ClusteredMTL(model, K, chosen)
    groups = [{"params": list(part.parameters()), "lr": 0.05} for part in (model, chosen)]
    groups = [group for group in groups if group["params"]]
    # A GradScaler takes no sharded and whole gradients in one optimizer.
    parts = [groups] if overflow is None else [[group] for group in groups]
    optimizers = [torch.optim.SGD(part, foreach=True) for part in parts]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=overflow is not None)
    for number in range(steps):
        layout = list(programs.LAYOUTS)[number % len(programs.LAYOUTS)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        batch = batches(layout, ranks, torch.float64, seed=number)[rank]
        if number == overflow and rank == 1:
            batch.target[:] = 1e308  # whose gradients overflow, too
        step(mtl, batch, **({} if overflow is None else {"scaler": scaler}))
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    state = {name: whole(value) for name, value in model.state_dict().items()}
    return {**state, "weights": mtl.last.weights, "scale": torch.tensor(scaler.get_scale())}


class TwoOutputs(nn.Module):
    """Returns another output [B], too, which the loss does not use, and has a buffer."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.inner, self.counts = make_model(torch.float64), counts
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        if self.counts:
            self.calls += 1
        hidden = self.inner(x, t)
        return {"noise": hidden, "unused": hidden.sum(1)}


def forwards_that_share_a_backward(sharded: bool, autocast: bool = False) -> dict[str, Tensor | None]:
    """Take a step whose loss comes from two forwards; return the gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = TwoOutputs()
    if sharded:
        shard(model.inner)
        model = _root(model)
    mtl = dm.ClusteredMTL(model, K, make_weighting("pcgrad"))
    outside = nn.Linear(6, 6, dtype=torch.float64)
    with torch.no_grad():
        outside.weight.copy_(torch.eye(6))
    batch = batches("absent on ranks", ranks, torch.float64)[rank]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, second = (
            mtl(x, batch.t, cluster=batch.cluster)["noise"] for x in (batch.x, outside(batch.x).double())
        )
        mtl.backward(dm.ops.sample_mse(first + 0.5 * second.double(), batch.target))
    # What is outside of the model gets the rank's own part of its gradient.
    dist.all_reduce(outside.weight.grad)
    return {**whole_outcome(mtl).grads, "outside": outside.weight.grad}


def _root(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))


def refuse_a_buffer() -> str:
    """Take a step with a model that counts its calls; return the error."""
    mtl = dm.ClusteredMTL(_root(TwoOutputs(counts=True)), K, make_weighting("pcgrad"))
    batch = batches("sorted", dist.get_world_size(), torch.float64)[dist.get_rank()]
    with pytest.raises(ValueError, match="buffers") as error:
        mtl(batch.x, batch.t, cluster=batch.cluster)
    return str(error.value)


def clipped(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of a step, what PyTorch finds, and what is left after clipping by the former to its half."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = shard(make_model(torch.float64))
    mtl = dm.ClusteredMTL(model, K, make_weighting("pcgrad"))
    step(mtl, batches(layout, ranks, torch.float64)[rank])
    norm = mtl.last.grad_norm
    theirs = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    nn.utils.clip_grads_with_norm_(model.parameters(), 0.5 * float(norm), norm)
    after = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm, whole(theirs), whole(after)


def train_alone_in_the_mesh() -> Outcome:
    """Take a step with a model that is sharded over this process alone."""
    from torch.distributed.fsdp import fully_shard

    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("others", "own"))["own"]
    model = fully_shard(make_model(torch.float64), mesh=mesh)
    mtl = dm.ClusteredMTL(model, K, make_weighting("pcgrad"), process_group=mesh.get_group())
    step(mtl, batches([programs.LAYOUTS["sorted"][rank]], 1, torch.float64)[0])
    found = whole_outcome(mtl)
    dist.barrier()
    return found


class Counted(TorchDispatchMode):
    """Counts what a rank sends, by the best algorithm of every collective (a ring), and by what it is for."""

    _KINDS = {
        "_allgather_base": ("gather", 1, 0),  # of FSDP2
        "allgather": ("rest", 1, 0),
        "reduce_scatter": ("reduce", 1, 1),
        "alltoall": ("reduce", 1, 1),
        "allreduce": ("rest", 2, 0),
        "broadcast": ("rest", 1, 0),
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"gather": 0.0, "reduce": 0.0, "rest": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            (kind, factor, position), *_ = [v for n, v in self._KINDS.items() if n in name]
            size = _group_size(args)
            self.bytes[kind] += factor * (size - 1) / size * _size(args[position])
        return func(*args, **(kwargs or {}))


def _group_size(args: Sequence[Any]) -> int:
    for each in args:
        if "ProcessGroup" in str(each):
            return dist.ProcessGroup.unbox(each).size()
    raise AssertionError(f"no process group in {args}")


def _size(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(each) for each in tensors)


def bytes_of_steps(one_each: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """Return what a plain step moves, one of all clusters on every rank, and one of a cluster a rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = shard(make_model(torch.float32, width=300))
    mtl = dm.ClusteredMTL(model, K, make_weighting("pcgrad"))
    everywhere = [[0, 1, 2, 3, 4]] * ranks
    found = []
    for layout, wrapped in ((everywhere, False), (everywhere, True), (one_each, True)):
        batch = batches(layout, ranks, torch.float32)[rank]
        if wrapped:
            step(mtl, batch)  # with checks
        with Counted() as counted:
            if wrapped:
                step(mtl, batch)
            else:
                dm.ops.sample_mse(model(batch.x, batch.t), batch.target).mean().backward()
        found.append(counted.bytes)
    return found


def bytes_by_mode(mode: str, layout: Sequence[Sequence[int]], kind: str) -> tuple[float, float, int, float]:
    """Return what a step of a mode moves for gradients and for gathers, P, and the share that is not resharded."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = make_model(torch.float32, width=300)
    model.frozen.requires_grad_(True)
    model.unused.requires_grad_(False)
    total = sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for part in (model.hidden, model.first) for p in part.parameters())
    if "sharded" in mode:
        shard(model, kind)
    mtl = dm.ClusteredMTL(model, K, make_weighting("uw" if mode == "plain replicated" else "pcgrad"))
    batch = batches(layout, ranks, torch.float32)[rank]

    def train() -> None:
        if mode == "plain sharded":
            dm.ops.sample_mse(model(batch.x, batch.t), batch.target).mean().backward()
        else:
            step(mtl, batch)

    train()
    with Counted() as counted:
        train()
    found = counted.bytes
    gathers = found["gather"] if "sharded" in mode else 0.0
    return sum(found.values()) - gathers, gathers, total, 1 - own / total


def refused(kind: str) -> str:
    """Set up what can't be done with sharded models; return the error."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch, options = batches("sorted", ranks, torch.float32)[rank], {}
    model = make_model(torch.float32, width=24)
    line = dist.init_device_mesh("cpu", (ranks,))
    square = dist.init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    if kind in ("grouped", "no sync", "lean", "accumulated", "without samples"):
        shard(model)
        options = {"grouped": {"engine": "grouped"}, "lean": {"memory": "lean"}}.get(kind, {})
    if kind == "no sync":
        model.set_requires_gradient_sync(False)
    if kind in ("tensor parallel", "both"):
        parallelize_module(model, square["tensor"], {"hidden": ColwiseParallel()})
    if kind in ("both", "group"):
        fully_shard(model, mesh=square["data"])
    if kind == "ignored":
        fully_shard(model, mesh=line, ignored_params={model.gain})

    def train() -> None:
        mtl = dm.ClusteredMTL(model, K, make_weighting("pcgrad"), **options)
        if kind == "afterwards":
            fully_shard(model, mesh=line)
        if kind == "around it":
            fully_shard(mtl, mesh=line)
        if kind == "without samples":
            mtl.backward(None)
        with mtl.no_sync() if kind == "accumulated" else contextlib.nullcontext():
            step(mtl, batch)

    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        train()
    dist.barrier()
    return f"{error.type.__name__}: {error.value}"


class MixesOnRank0(programs.Denoiser):
    """Subtracts the mean of the batch from the samples of rank 0."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x - x.mean(0) if dist.get_rank() == 0 else x, t)


def mixing() -> str:
    """Take a step with a model that mixes the samples of rank 0; return the error."""
    mtl = dm.ClusteredMTL(shard(MixesOnRank0()), K, make_weighting("pcgrad"))
    with pytest.raises((ValueError, RuntimeError)) as error:
        step(mtl, batches("sorted", dist.get_world_size(), torch.float32)[dist.get_rank()])
    return f"{error.type.__name__}: {error.value}"


def differentiate_otherwise() -> str:
    """Differentiate the output of a sharded model without mtl.backward; return the error."""
    mtl = dm.ClusteredMTL(shard(make_model(torch.float32)), K, make_weighting("pcgrad"))
    batch = batches("sorted", dist.get_world_size(), torch.float32)[dist.get_rank()]
    with pytest.raises(RuntimeError) as error:
        mtl(batch.x, batch.t, cluster=batch.cluster).sum().backward()
    return f"{error.type.__name__}: {error.value}"
