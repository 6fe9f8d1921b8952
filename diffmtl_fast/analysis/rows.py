"""Gradients of many tasks, one row each, in memory or in files, and their Gramian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from .._files import remove_leftovers, replacing

_COLUMNS = 2**24  # elements of all rows together that a step of the Gramian takes


class Rows:
    """Blocks of consecutive rows, kept as they come.

    Args:
        folder: where each block becomes a file, whole or absent, for a later run to find; None keeps them in
            memory.
        memory: on the CPU, written over: [n, width] for all rows, or, with a folder, for one block at a time.
        name: of the files.
    """

    def __init__(self, folder: Path | None, memory: Tensor, name: str = "rows") -> None:
        self._folder, self._memory, self._name = folder, memory, name
        self._there: set[int] = set()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)

    def has(self, first: int) -> bool:
        """Whether the block that begins with a row is there."""
        return first in self._there or (self._folder is not None and self._path(first).exists())

    def vacant(self, first: int, number: int) -> Tensor:
        """Return memory for a block: who fills it passes it to `put`, which then has nothing to copy."""
        start = first if self._folder is None else 0
        return self._memory[start : start + number]

    def put(self, first: int, rows: Tensor) -> None:
        """Keep a block, [n, width]."""
        if self._folder is not None:
            with replacing(self._path(first)) as aside:
                np.save(aside, rows.cpu().numpy())
            return
        place = self.vacant(first, len(rows))
        if place.data_ptr() != rows.data_ptr():
            place.copy_(rows)
        self._there.add(first)

    def blocks(self, firsts: Sequence[int]) -> list[NDArray]:
        """All rows: those in memory as one block, those in files as maps of the blocks with these first rows."""
        if self._folder is None:
            return [self._memory.numpy()]
        return [np.load(self._path(first), mmap_mode="c") for first in firsts]

    def clear(self) -> None:
        """Delete everything."""
        self._there.clear()
        if self._folder is not None:
            for path in self._folder.glob(f"{self._name}-*.npy"):
                path.unlink()

    def _path(self, first: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-{first:08d}.npy"


def new_rows(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return memory on the CPU for rows.

    NumPy asks Linux for huge pages where PyTorch does not: gigabytes of fresh memory are then written more than
    twice as fast.
    """
    return torch.from_numpy(np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))


def gram(blocks: Sequence[NDArray], device: torch.device | str = "cpu") -> NDArray[np.float64]:
    """The Gramian of rows that need not fit into memory: every element is read once.

    Several blocks, and those for another device, some columns at a time, whose products are added up in float64.

    Args:
        blocks: [n_i, P] each, of one dtype; together n rows.
        device: where to compute.

    Returns:
        float64 [n, n], symmetric.
    """
    number, width = sum(len(block) for block in blocks), blocks[0].shape[1]
    if len(blocks) == 1 and torch.device(device).type == "cpu":
        return ops.gram(torch.from_numpy(blocks[0])).double().numpy()
    step = max(1, _COLUMNS // number)
    total = torch.zeros(number, number, dtype=torch.float64)
    memory = np.empty(number * min(step, width), blocks[0].dtype)
    for start in range(0, width, step):
        parts = [block[:, start : start + step] for block in blocks]
        shape = number, parts[0].shape[1]
        columns = np.concatenate(parts, out=memory[: math.prod(shape)].reshape(shape))
        total += ops.gram(torch.from_numpy(columns).to(device)).cpu()
    return total.numpy()


def cosines(gramian: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of the rows from their Gramian; exactly 1 on the diagonal, NaN for rows of zeros."""
    norms = np.sqrt(gramian.diagonal())
    with np.errstate(invalid="ignore"):
        found = np.clip(gramian / np.outer(norms, norms), -1.0, 1.0)
    np.fill_diagonal(found, np.where(norms > 0.0, 1.0, math.nan))
    return found
