"""Gradients of many tasks, one row each, in memory or in files, and their Gramian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._files import remove_leftovers, replacing

_COLUMNS = 2**24  # elements of all rows together that a step of the Gramian takes
_PANEL = 128  # rows, of whose products those with the rows before are not computed


class Rows:
    """Blocks of consecutive rows, kept as they come.

    Args:
        folder: where each block becomes a file, whole or absent, for a later run to find; None keeps them in
            memory.
        name: of the files.
    """

    def __init__(self, folder: Path | None, name: str = "rows") -> None:
        self._folder, self._name = folder, name
        self._blocks: dict[int, NDArray] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)

    def has(self, first: int) -> bool:
        """Whether the block that begins with a row is there."""
        return first in self._blocks or (self._folder is not None and self._path(first).exists())

    def put(self, first: int, rows: Tensor) -> None:
        """Keep a block, [n, width]."""
        block = rows.cpu().numpy()
        if self._folder is None:
            self._blocks[first] = block
            return
        with replacing(self._path(first)) as aside:
            np.save(aside, block)

    def blocks(self, firsts: Sequence[int]) -> list[NDArray]:
        """The blocks that begin with these rows, those in files as maps of them."""
        if self._folder is None:
            return [self._blocks[first] for first in firsts]
        return [np.load(self._path(first), mmap_mode="r") for first in firsts]

    def clear(self) -> None:
        """Delete everything."""
        self._blocks.clear()
        if self._folder is not None:
            for path in self._folder.glob(f"{self._name}-*.npy"):
                path.unlink()

    def _path(self, first: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-{first:08d}.npy"


def gram(blocks: Sequence[NDArray], device: torch.device | str = "cpu") -> NDArray[np.float64]:
    """The Gramian of rows that need not fit into memory: every element is read once, some columns at a time.

    Products are formed in the rows' dtype over some thousands of columns, and added up in float64.

    Args:
        blocks: [n_i, P] each, of one dtype; together n rows.
        device: where to compute.

    Returns:
        float64 [n, n], symmetric.
    """
    number, width = sum(len(block) for block in blocks), blocks[0].shape[1]
    step = max(1, _COLUMNS // number)
    total = torch.zeros(number, number, dtype=torch.float64)
    for start in range(0, width, step):
        columns = np.concatenate([block[:, start : start + step] for block in blocks])
        part = torch.from_numpy(columns).to(device)
        for first in range(0, number, _PANEL):
            total[first : first + _PANEL, first:] += (part[first : first + _PANEL] @ part[first:].T).cpu()
    return _mirrored(total).numpy()


def cosines(gramian: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of the rows from their Gramian; exactly 1 on the diagonal, NaN for rows of zeros."""
    norms = np.sqrt(gramian.diagonal())
    with np.errstate(invalid="ignore"):
        found = np.clip(gramian / np.outer(norms, norms), -1.0, 1.0)
    np.fill_diagonal(found, np.where(norms > 0.0, 1.0, math.nan))
    return found


def _mirrored(matrix: Tensor) -> Tensor:
    """The symmetric matrix of an upper triangle."""
    return matrix.triu() + matrix.triu(1).T
