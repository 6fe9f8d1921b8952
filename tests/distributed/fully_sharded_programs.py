"""What the ranks do with fully sharded models, and what that moves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
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
    **options: Any,
) -> Outcome:
    """Take a step of so many backwards on this rank with a sharded model."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = shard(make_model(dtype, seeds[rank]), kind, **options)
    with logged() as messages:
        mtl = dm.ClusteredMTL(model, K, make_weighting(weighting, rank).to(dtype), **mtl_options or {})
        mtl.measure_gramian = measure
        for number in range(backwards):
            step(mtl, batches(layout, ranks, dtype, seed=number)[rank])
    return whole_outcome(mtl, messages=messages)
