"""Launch settings: block size and warps from the size of the problem, by one rule, so that runs repeat exactly."""

from __future__ import annotations

from typing import NamedTuple

# A program's share of a streamed row. With 8 warps each thread holds 16 elements: four 16-byte loads of float32 in
# flight per operand, which is what hides the memory's latency.
STREAM_BLOCK = 4096
# Up to this many clusters a Gramian is formed by vector products in registers; beyond it, by tile products.
MAX_VECTOR_CLUSTERS = 8
MAX_CLUSTERS = 64
# About how many programs share the tile products: their partial Gramians must stay small beside J.
TILE_PROGRAMS = 4096
# Loading a float64 Gramian beyond this size takes the registers that the Nash solver needs.
MAX_FLOAT64_NASH_CLUSTERS = 32
# The Nash solver keeps two tiles and many vectors: threads with more registers each are better than more threads.
NASH_WARPS = 8

# Sums over clusters: with this many programs a large GPU has a few rounds of them. Where there are fewer, the rows
# of a cluster are shared out, but not in shares so short that writing their sums takes as long as forming them.
TARGET_PROGRAMS = 512
LEAST_ROWS_PER_SHARE = 512
# The backward of a normalisation over rows keeps a row and the sums of its columns in registers, a row of at most
# this many bytes. A share writes two rows of sums, and reads and writes three rows for each of its own.
MAX_NORM_BYTES = 16384
LEAST_ROWS_PER_NORM_SHARE = 32


class Settings(NamedTuple):
    """Elements per program and warps per program."""

    block: int
    num_warps: int


class ClusterSumSettings(NamedTuple):
    """Rows and columns of a step, shares of a cluster, warps per program."""

    rows: int
    block: int
    shares: int
    num_warps: int


class GroupNormSettings(NamedTuple):
    """Channels and positions of a tile, and warps per program."""

    rows: int
    block: int
    num_warps: int


class NormRowsSettings(NamedTuple):
    """Rows of a step and columns, shares of a cluster, warps per program."""

    rows: int
    block: int
    shares: int
    num_warps: int


class WgradSettings(NamedTuple):
    """Rows of a step, outputs and inputs of a tile, shares of a cluster, warps per program."""

    rows: int
    outputs: int
    inputs: int
    shares: int
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


def gram_settings(num_clusters: int, size: int, itemsize: int, aligned: bool) -> Settings:
    """Settings for the Gramian of [num_clusters, size]: two rows, or the tile of all, must fit the registers.

    `itemsize` is that of the products. Elements that are loaded one by one, because nothing is known of their
    alignment, take a register each.
    """
    if num_clusters > MAX_VECTOR_CLUSTERS:
        return Settings(128, 4) if num_clusters <= 32 else Settings(64, 8)
    block, num_warps = stream_settings(size)
    if itemsize == 8:  # 8 elements per thread: 16 bytes of the shortest rows
        block = max(block // 4, 128)
        return Settings(block, max(1, block // 256))
    return Settings(block if aligned else max(block // 2, 128), num_warps)


class SumSettings(NamedTuple):
    """Pairs of clusters per program, terms of each at a time, and warps per program."""

    pairs: int
    block: int
    num_warps: int


def sum_settings(num_clusters: int) -> SumSettings:
    """Settings for adding up partial Gramians: few pairs have many terms each, many pairs have few."""
    return SumSettings(1, 1024, 4) if num_clusters <= MAX_VECTOR_CLUSTERS else SumSettings(128, 32, 4)


def weight_settings(num_clusters: int, most_warps: int = 16, tiles: int = 1) -> Settings:
    """Settings for a K×K problem in one program: float64 tiles at 8 elements per thread do not spill."""
    tile = power_of_two(num_clusters)
    return Settings(tile, max(1, min(most_warps, tiles * tile * tile // 256)))


def _shares(programs: int, rows: int) -> int:
    """Shares of a cluster of `rows` rows, given the programs that there are without sharing."""
    return max(1, min(ceil_div(TARGET_PROGRAMS, programs), rows // LEAST_ROWS_PER_SHARE))


def cluster_sum_settings(num_clusters: int, num_rows: int, size: int) -> ClusterSumSettings:
    """Settings for the sums of `num_rows` rows of `size` elements over clusters."""
    mean = ceil_div(num_rows, num_clusters)  # all that is known without reading the offsets
    block = min(256, max(power_of_two(size), 32))
    rows = min(STREAM_BLOCK // block, max(power_of_two(mean), 1))
    shares = _shares(num_clusters * ceil_div(size, block), mean)
    return ClusterSumSettings(rows, block, shares, max(1, min(8, rows * block // 512)))


def group_norm_settings(channels: int, size: int) -> GroupNormSettings:
    """Settings for groups of `channels` channels of `size` elements: two operands and two sums in registers."""
    tile = STREAM_BLOCK // 2
    block = min(tile // 2, power_of_two(size))
    rows = min(tile // block, power_of_two(channels))
    return GroupNormSettings(rows, block, max(1, rows * block // 512))


def norm_rows_settings(num_clusters: int, num_rows: int, size: int, sum_size: int) -> NormRowsSettings:
    """Settings for normalised rows of `size` elements, which are added up in numbers of `sum_size` bytes."""
    mean = ceil_div(num_rows, num_clusters)
    block = power_of_two(size)
    rows = max(1, min(STREAM_BLOCK * 2 // sum_size // block, power_of_two(mean)))
    shares = max(1, min(ceil_div(TARGET_PROGRAMS, num_clusters), mean // LEAST_ROWS_PER_NORM_SHARE))
    return NormRowsSettings(rows, block, shares, max(1, min(16, rows * block * sum_size // 2048)))


def wgrad_settings(
    num_clusters: int, num_rows: int, num_outputs: int, num_inputs: int, element_size: int
) -> WgradSettings:
    """Settings for weight gradients: tiles as large as registers hold their sums, and no larger than needed."""
    mean = ceil_div(num_rows, num_clusters)
    largest = 64 if element_size == 8 else 128
    outputs, inputs = (min(largest, max(power_of_two(n), 16)) for n in (num_outputs, num_inputs))
    rows = min(64 if element_size == 2 else 16, max(power_of_two(mean), 16))
    shares = _shares(num_clusters * ceil_div(num_outputs, outputs) * ceil_div(num_inputs, inputs), mean)
    num_warps = max(1, min(8, outputs * inputs * element_size // 2048))
    return WgradSettings(rows, outputs, inputs, shares, num_warps)
