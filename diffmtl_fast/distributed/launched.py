"""Several processes under torchrun or `accelerate launch`: which one this is, and what they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


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
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    finally:
        dist.destroy_process_group()


def gathered(values: Tensor) -> Tensor:
    """Those of all processes, in the order of their numbers."""
    if world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
