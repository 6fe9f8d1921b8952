"""Small tables on the device: copied there without waiting for it, and once for as long as they stay the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from ..._host import upload
from .._checks import host_offsets


class Uploaded:
    """A function that makes a table on the host, and then returns it on the device that is its first argument.

    Equal arguments give one upload for each stream: within a stream the copy comes before its use.
    """

    def __init__(self, make: Callable[..., np.ndarray]) -> None:
        self._make = make
        self.cached = functools.lru_cache(maxsize=64)(self._upload)

    def __call__(self, device: torch.device, *key: Hashable) -> Tensor:
        """Return the table of `key` on a device."""
        if device.type != "cuda":
            return self.cached(device, 0, *key)
        if torch.cuda.is_current_stream_capturing():
            return self._upload(device, 0, *key)  # memory allocated now belongs to the graph
        return self.cached(device, torch.cuda.current_stream(device).cuda_stream, *key)

    def _upload(self, device: torch.device, stream: int, *key: Hashable) -> Tensor:
        table = torch.from_numpy(self._make(*key))
        return upload(table, device)


@Uploaded
def _offsets(*bounds: int) -> np.ndarray:
    return np.array(bounds, dtype=np.int64)


def place_offsets(offsets: Tensor, rows: Tensor) -> tuple[list[int] | None, Tensor]:
    """Return offsets as the host knows them, checked, if it does, and on the device of the `rows` they divide."""
    if offsets.device.type != "cpu":
        return None, offsets.contiguous()
    bounds = host_offsets(offsets, rows.shape[0])
    return bounds, _offsets(rows.device, *bounds)
