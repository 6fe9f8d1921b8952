"""Many tensors as few: what is exchanged together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

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
