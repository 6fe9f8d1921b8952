"""Launches over a Jacobian in parts: one for all parts of a kind, told by a table on the device which they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ...kernels import parts as part_kernels
from ...kernels import settings
from .._checks import ByDtype
from .uploads import Uploaded

TRITON_DTYPES = ByDtype(
    {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
)

# What sums are formed in.
SUM_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

# The bits that are 0 in a multiple of the alignment, a power of two.
_UNALIGNED = part_kernels.ALIGNMENT.value - 1

# Address, row stride and length of the rows; address of the output and whether to add to it.
Record = tuple[int, int, int, int, bool]


class Launch(NamedTuple):
    """One launch: parts of one dtype for rows and one for outputs, all aligned or none."""

    dtype: torch.dtype
    out_dtype: torch.dtype
    aligned: bool
    rows: list[Tensor]
    outputs: list[Tensor]
    records: list[Record]
    sizes: list[int]  # columns of every part

    @property
    def device(self) -> torch.device:
        """The device of all parts."""
        return self.rows[0].device

    @property
    def longest(self) -> int:
        """The columns of the longest part."""
        return max(self.sizes)

    @property
    def columns(self) -> int:
        """The columns of all parts."""
        return sum(self.sizes)

    @property
    def adds(self) -> bool:
        """Whether any output is added to."""
        return any(record[4] for record in self.records)

    def programs(self, chunk: int) -> int:
        """Return the number of programs when each takes up to `chunk` columns of a part."""
        return _programs(tuple(self.sizes), chunk)

    def arguments(self, chunk: int) -> dict[str, Any]:
        """Return where the kernel finds its rows: in arguments if there is one part, else in a table."""
        named: dict[str, Any] = {"DTYPE": TRITON_DTYPES[self.dtype]}
        if len(self.records) == 1:  # Triton sees by itself what is aligned
            _, stride, columns, _, _ = self.records[0]
            named |= {"p_rows": self.rows[0], "size": columns, "stride": stride}
            return named | {"p_record": None, "p_part": None, "ALIGNED": False}
        records = _records(self.device, tuple(self.records), chunk)
        parts = _parts(self.device, tuple(self.sizes), chunk)
        named |= {"p_rows": None, "size": None, "stride": None}
        return named | {"p_record": records, "p_part": parts, "ALIGNED": self.aligned}


def plan(rows: Sequence[Tensor], out: Sequence[Tensor], accumulate: Sequence[bool]) -> list[Launch]:
    """Divide parts into launches; parts without elements are in none.

    Args:
        rows: [K, ...] each, dense rows.
        out: dense outputs in the order of the rows; for a reduction the rows again.
        accumulate: whether to add to each output.
    """
    launches: dict[tuple[torch.dtype, torch.dtype, bool], Launch] = {}
    k = rows[0].shape[0] if rows else 1
    for part, written, add in zip(rows, out, accumulate, strict=True):
        elements = part.numel()
        if elements == 0:
            continue
        stride, columns, address = part.stride(0), elements // k, part.data_ptr()
        target = address if written is part else written.data_ptr()
        aligned = not (address | stride | columns | target) & _UNALIGNED
        kind = (part.dtype, written.dtype, aligned)
        launch = launches.get(kind)
        if launch is None:
            launch = launches[kind] = Launch(*kind, [], [], [], [])
        launch.rows.append(part)
        launch.outputs.append(written)
        launch.records.append((address, stride, columns, target, add))
        launch.sizes.append(columns)
    return list(launches.values())


@functools.lru_cache(maxsize=256)
def _programs(sizes: tuple[int, ...], chunk: int) -> int:
    return sum(settings.ceil_div(columns, chunk) for columns in sizes)


@Uploaded
def _records(records: tuple[Record, ...], chunk: int) -> np.ndarray:
    """Return the records as kernels/parts.py reads them, int64 [parts, FIELDS]."""
    rows = np.array(records, dtype=np.int64)
    programs = -(-rows[:, 2] // chunk)
    return np.insert(rows, 3, np.cumsum(programs) - programs, axis=1)


@Uploaded
def _parts(columns: tuple[int, ...], chunk: int) -> np.ndarray:
    """Return the part of every program, int32."""
    programs = -(-np.array(columns) // chunk)
    return np.repeat(np.arange(len(columns), dtype=np.int32), programs)


def add_up(partial: Sequence[Tensor], k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Launch the sum of several [k, k, programs] over all programs; of each pair (i, j), only i ≤ j is read."""
    total = torch.empty(k, k, dtype=dtype, device=device)
    if not partial:
        return total.zero_()
    terms = partial[0] if len(partial) == 1 else torch.cat(list(partial), dim=2)
    pairs, block, num_warps = settings.sum_settings(k)
    part_kernels._sum_kernel[settings.ceil_div(k * k, pairs),](
        terms, total, terms.shape[2], K=k, PAIRS=pairs, BLOCK=block, num_warps=num_warps
    )
    return total
