"""Storage of the Jacobian: one row of gradients per cluster, filled by autograd in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops


@dataclass(frozen=True)
class _Block:
    """The columns of J that belong to the parameters of one dtype."""

    rows: Tensor  # [K, P of this dtype]
    members: list[int]  # which parameters
    offsets: list[int]  # where each one's columns start


class Jacobian:
    """J, [K, P], for a list of parameters; its columns are grouped by the parameters' dtype.

    Autograd writes J: `views[k][i]` is the part of row k that belongs to parameter i, shaped and strided like it.
    Installed as the `.grad` of a leaf, backward adds to it in place, so no second copy of J ever exists.

    Args:
        parameters: the trainable parameters, all on one device.
        num_clusters: K.

    Attributes:
        views: [K] lists of one tensor per parameter.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_clusters: int) -> None:
        self._parameters = list(parameters)
        self._blocks = [self._allocate(dtype, num_clusters) for dtype in {p.dtype: None for p in parameters}]
        self.views: list[list[Tensor]] = [self._row_views(k) for k in range(num_clusters)]
        self.clear()

    def _allocate(self, dtype: torch.dtype, num_clusters: int) -> _Block:
        members = [i for i, p in enumerate(self._parameters) if p.dtype == dtype]
        offsets = [0]
        for i in members:
            offsets.append(offsets[-1] + self._parameters[i].numel())
        rows = torch.empty(
            num_clusters, offsets.pop(), dtype=dtype, device=self._parameters[members[0]].device
        )
        return _Block(rows, members, offsets)

    def _row_views(self, k: int) -> list[Tensor]:
        views: dict[int, Tensor] = {}
        for block in self._blocks:
            for i, offset in zip(block.members, block.offsets, strict=True):
                start = k * block.rows.shape[1] + offset
                # set_ and not a view: a tensor of its own counts its own writes, which tells `touched` whether
                # backward reached this parameter.
                views[i] = torch.empty(0, dtype=block.rows.dtype, device=block.rows.device).set_(
                    block.rows.untyped_storage(),
                    start,
                    self._parameters[i].shape,
                    dense_stride(self._parameters[i]),
                )
        return [views[i] for i in range(len(self._parameters))]

    def clear(self) -> None:
        """Set J to zero and forget which entries were written."""
        for block in self._blocks:
            block.rows.zero_()
        self._versions = [[view._version for view in row] for row in self.views]

    @property
    def touched(self) -> list[bool]:
        """For every parameter, whether backward has written to any row of it since `clear`."""
        rows = zip(self.views, self._versions, strict=True)
        written = [[v._version != old for v, old in zip(row, olds, strict=True)] for row, olds in rows]
        return [any(column) for column in zip(*written, strict=True)]

    def gram(self) -> Tensor:
        """Return J Jᵀ, [K, K], float32 at least."""
        gramian = ops.gram(self._blocks[0].rows)
        for block in self._blocks[1:]:
            gramian = gramian + ops.gram(block.rows)
        return gramian

    def combine(self, weights: Tensor) -> list[Tensor]:
        """Return Σ_k w_k g_k, one tensor per parameter, shaped and strided like it."""
        parts: dict[int, Tensor] = {}
        for block in self._blocks:
            direction = ops.combine(block.rows, weights)
            for i, offset in zip(block.members, block.offsets, strict=True):
                parameter = self._parameters[i]
                parts[i] = direction.as_strided(parameter.shape, dense_stride(parameter), offset)
        return [parts[i] for i in range(len(self._parameters))]


def dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's strides if they fill its memory without gaps, else contiguous ones."""
    return torch.empty_like(parameter, device="meta").stride()
