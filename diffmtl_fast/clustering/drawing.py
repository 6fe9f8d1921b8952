"""Where the noise levels of a batch are drawn, and how they get to the device that trains on them.

The host draws, unless it is given a device's generator. So it knows how many samples each cluster has, which the
device could tell only to a host that waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._host import upload, upload_clusters


def places(
    device: torch.device | str | None, generator: torch.Generator | None
) -> tuple[torch.device, torch.device]:
    """Return where levels go, by default to where they are drawn, and where that is: at the generator.

    Raises:
        ValueError: the generator is neither on the host nor on the device.
    """
    source = torch.device("cpu") if generator is None else generator.device
    target = source if device is None else torch.empty(0, device=device).device  # "cuda" is a particular GPU
    if source.type != "cpu" and source != target:
        raise ValueError(f"generator: expected one on the CPU or on {target}, found one on {source}")
    return target, source


def hand_over(level: Tensor, cluster: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return drawn levels and their sorted clusters on a device, without waiting for it."""
    if cluster.device == device:
        return level, cluster
    return upload(level, device), upload_clusters(cluster, device)


def random_integers(
    end: int, size: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Draw from 0 … end-1 where the generator is, and return it on the device, int64 [*size]."""
    source = device if generator is None else generator.device
    return upload(torch.randint(end, size, device=source, generator=generator), device)


def clusters_of_rank(k: int, rank: int, world_size: int, step: int) -> list[int]:
    """Return the clusters that a rank draws from in a step: ``ceil(k / world_size)`` of them, in rising order.

    All ranks together draw from every cluster, from some of them twice where the numbers do not divide. From one
    step to the next every rank moves on by one cluster.

    Raises:
        ValueError: there is no such rank or step.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size, found {rank} of {world_size}")
    if step < 0:
        raise ValueError(f"step: expected at least 0, found {step}")
    return sorted((step + rank + turn * world_size) % k for turn in range(math.ceil(k / world_size)))
