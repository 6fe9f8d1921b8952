"""What the host sends to an accelerator, and what it knows of what it sent, without ever waiting for it."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._torch import version

# Of clusters on an accelerator: how often they had been written to, and their counts.
_counts: MutableMapping[Tensor, tuple[int, list[int]]] = WeakTensorKeyDictionary()

# What CUDA graphs upload: every replay reads it again.
_READ_BY_GRAPHS: list[Tensor] = []

# The devices whose values the host reads without waiting, and those that copy from pinned memory by themselves.
_READABLE = {"cpu"}
_PINS = {"cuda"}


def on_host(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for an accelerator."""
    return tensor.device.type in _READABLE


def pins(device: torch.device) -> bool:
    """Whether a device copies from pinned memory without the host waiting for it."""
    return device.type in _PINS


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for a copy from its own memory to a GPU."""
    if tensor.device.type == "cpu" and pins(device):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Memory of PyTorch's, pinned or not, would go to others before a replay reads it.
            _READ_BY_GRAPHS.append(tensor.clone())
            return _READ_BY_GRAPHS[-1].to(device, non_blocking=True)
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload_clusters(cluster: Tensor, device: torch.device) -> Tensor:
    """Return the clusters of a batch on a device, and remember how many samples each has.

    Args:
        cluster: int64 [B] on the host, at least 0 and sorted.
        device: where to.
    """
    uploaded = upload(cluster, device)
    if device.type != "cpu" and not uploaded.is_inference():  # whether those are written to is not known
        _counts[uploaded] = version(uploaded), torch.bincount(cluster).tolist()
    return uploaded


def known_counts(cluster: Tensor) -> list[int] | None:
    """Return how many samples the clusters 0, 1, … the last present one have, if the host knows.

    It does of what `upload_clusters` returned, as long as nobody has written to it; such clusters are sorted.
    """
    written, counts = _counts.get(cluster, (0, None))
    return counts if counts is not None and written == version(cluster) else None
