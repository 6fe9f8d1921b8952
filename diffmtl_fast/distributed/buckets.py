"""Many tensors as few: what is exchanged together, when it is sent, and the memory that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

#: Bytes of one exchange: enough for the speed of the network, little beside the model.
LIMIT = 32 << 20


def in_buckets(items: Iterable[tuple[Hashable, int]], limit: int | None = None) -> list[list[int]]:
    """Group the indices of items in their order.

    Args:
        items: of each what those of a bucket have in common, such as a dtype, and its bytes.
        limit: bytes that a bucket does not exceed, unless a single item does. Default: `LIMIT`.
    """
    limit = LIMIT if limit is None else limit
    buckets: list[list[int]] = []
    open_ones: dict[Hashable, tuple[list[int], int]] = {}
    for index, (kind, size) in enumerate(items):
        bucket, filled = open_ones.get(kind, ([], 0))
        if not bucket or filled + size > limit:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(index)
        open_ones[kind] = bucket, filled + size
    return buckets


def in_order_of_backward(items: Sequence[tuple[Hashable, int]]) -> list[list[int]]:
    """Group the positions of parameters, the last ones first: backwards come to them in about this order."""
    last = len(items) - 1
    return [[last - index for index in bucket] for bucket in in_buckets(reversed(items))]


class Departures:
    """Sends buckets as soon as all in them is complete, in an order that is the same on all ranks.

    Args:
        buckets: positions of parameters.
        send: starts the exchange of a bucket.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], send: Callable[[Sequence[int]], None]) -> None:
        self._buckets, self._send = buckets, send
        self._bucket_of = {position: i for i, bucket in enumerate(buckets) for position in bucket}
        self._missing = [len(bucket) for bucket in buckets]
        self._sent = 0

    def complete(self, position: int) -> None:
        """Hear that nothing is added to a parameter's gradients any more, at most once of each."""
        self._missing[self._bucket_of[position]] -= 1
        while self._sent < len(self._buckets) and not self._missing[self._sent]:
            self._send_next()

    def flush(self) -> None:
        """Send what is left, complete or not."""
        while self._sent < len(self._buckets):
            self._send_next()

    def _send_next(self) -> None:
        self._sent += 1  # an exchange that fails is not tried again
        self._send(self._buckets[self._sent - 1])


class Workspace:
    """Memory of exchanges that all steps use again: on a CPU, to map fresh memory takes as long as to copy it."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a contiguous tensor that holds anything."""
        if device.type != "cpu":  # whose memory PyTorch keeps
            return torch.empty(*shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        fitting = [memory for memory in self._free if size <= memory.numel() <= 2 * size]
        if fitting:
            memory = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not memory]
        else:
            memory = torch.empty(size, dtype=torch.uint8)
            if self._free:  # of sizes that are no longer asked for
                del self._free[0]
        return memory[:size].view(dtype).view(*shape)

    def give_back(self, *tensors: Tensor) -> None:
        """Take tensors back that nobody reads or writes any more."""
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.numel():
                self._free.append(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))
