"""Launch settings: block size and warps from the size of the problem, by one rule, so that runs repeat exactly."""

from __future__ import annotations

from typing import NamedTuple

# A program's share of a streamed row. With 8 warps each thread holds 16 elements: four 16-byte loads of float32 in
# flight per operand, which is what hides the memory's latency.
STREAM_BLOCK = 4096
# Up to this many clusters a Gramian is formed by vector products in registers; beyond it, by tile products.
MAX_VECTOR_CLUSTERS = 8
MAX_CLUSTERS = 64
# Loading a float64 Gramian beyond this size takes the registers that the Nash solver needs.
MAX_FLOAT64_NASH_CLUSTERS = 32


class Settings(NamedTuple):
    """Elements per program and warps per program."""

    block: int
    num_warps: int


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`, and 1 at least."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(size: int, block: int) -> int:
    """Return the number of blocks that cover `size` elements."""
    return -(-size // block)


def stream_settings(size: int) -> Settings:
    """Settings for a kernel that streams rows of `size` elements."""
    block = min(STREAM_BLOCK, max(power_of_two(size), 128))
    return Settings(block, max(1, min(8, block // 512)))


def sample_block(batch: int) -> int:
    """Return how many samples at a time a program reads that goes over the whole batch."""
    return min(1024, max(power_of_two(batch), 32))


def gram_settings(num_clusters: int, size: int) -> Settings:
    """Settings for the Gramian of [num_clusters, size]: the tile of all rows must fit the registers."""
    if num_clusters <= MAX_VECTOR_CLUSTERS:
        return stream_settings(size)
    return Settings(128, 4) if num_clusters <= 32 else Settings(64, 8)


def weight_settings(num_clusters: int) -> Settings:
    """Settings for a K×K problem in one program: a float64 tile at 8 elements per thread does not spill."""
    tile = power_of_two(num_clusters)
    return Settings(tile, max(1, min(16, tile * tile // 256)))
