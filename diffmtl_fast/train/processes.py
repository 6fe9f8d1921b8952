"""Several processes under torchrun or `accelerate launch`: which one this is, and what they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from .config import PLAIN, Config
from .errors import UserError


def rank() -> int:
    """The number of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(config: Config) -> Iterator[Config]:
    """Meet the other processes that a launcher started; the configuration with this process's own device.

    Raises:
        UserError: the method cannot be trained by several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield config
        return
    if not config.balanced and config.method != PLAIN:
        raise UserError(
            f"method: expected one of clusters, or {PLAIN}, in several processes, found {config.method}"
        )
    cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    finally:
        dist.destroy_process_group()


def gathered(values: Tensor) -> Tensor:
    """Those of all processes, in the order of their numbers."""
    if world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
