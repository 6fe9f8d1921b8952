"""Several processes under torchrun or `accelerate launch`: which one this is, and what they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """The number of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def waiting() -> bool:
    """Whether a launcher has started several processes that have not met yet."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Meet the other processes that a launcher started, if there are any.

    Args:
        device: auto, cpu, cuda or cuda:N.

    Yields:
        This process's own device.
    """
    if not waiting():
        yield device
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def largest(number: int) -> int:
    """The largest of the numbers of all processes; the hosts meet, no accelerator is waited for."""
    if world() == 1:
        return number
    found = torch.tensor([number])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def of_the_first(thing: Any) -> Any:
    """What the first process has."""
    things = [thing]
    if world() > 1:
        dist.broadcast_object_list(things)
    return things[0]


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model over all processes by FSDP2: every block of its lists by itself, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The modules in the outermost `nn.ModuleList`s that have parameters."""
    found: list[nn.Module] = []
    for child in module.children():
        listed = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        if listed and any(True for _ in child.parameters()):
            found.append(child)
        elif not listed:
            found += _blocks(child)
    return found


def gathered(values: Tensor) -> Tensor:
    """Those of all processes, in the order of their numbers."""
    if world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
