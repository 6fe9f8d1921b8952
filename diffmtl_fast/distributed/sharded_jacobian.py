"""The Jacobian of the whole batch, of which every rank holds some columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops.gram import gram_at_any_scale
from .buckets import in_buckets
from .ranks import Ranks

if TYPE_CHECKING:
    from ..gradients.stores import Jacobian


class ShardedJacobian:
    """Reads what the Jacobians of all ranks add up to, as a `Store` is read.

    Gramians of the ranks' own Jacobians can't be added up: the norm of a sum is not the sum of norms. Those of
    disjoint columns of the sum can. So every rank gets the sum of some columns (all-to-all: K times the
    parameters), its part of the Gramian is added to the others' (K² numbers), and its columns of the update are
    given to all (all-gather: once the parameters). That is (K + 1)/2 times what an all-reduce of the gradients
    moves.

    Args:
        jacobian: this rank's, after its backward: row k is its part of a sum over the ranks.
        ranks: the ranks.
    """

    def __init__(self, jacobian: Jacobian, ranks: Ranks) -> None:
        self._jacobian, self._ranks = jacobian, ranks
        self._buckets: list[list[int]] = []  # positions of the parameters that are exchanged together
        self._shards: list[Tensor] = []  # of every bucket, [K, columns of this rank]

    def gramian(self) -> Tensor:
        """Return J Jᵀ, float64 [K, K], at any scale.

        Raises:
            RuntimeError: a rank failed in its backward.
        """
        jacobian, ranks = self._jacobian, self._ranks
        touched = ranks.share(torch.tensor(jacobian.touched, dtype=torch.float64)).any(0).tolist()
        positions = [position for position, reached in enumerate(touched) if reached]
        kinds = []
        for position in positions:
            block, parameter = jacobian.blocks[position], jacobian.parameters[position]
            kinds.append(((block.dtype, parameter.dtype), block.numel() * block.element_size()))
        self._buckets = [[positions[i] for i in bucket] for bucket in in_buckets(kinds)]
        self._shards = [ranks.scatter_sum(self._cut(bucket)) for bucket in self._buckets]
        if not self._shards:
            return jacobian.blocks[0].new_zeros((jacobian.num_clusters,) * 2, dtype=torch.float64)
        gramian = gram_at_any_scale(self._shards)
        ranks.add_([gramian])
        return gramian

    def _cut(self, bucket: list[int]) -> Tensor:
        """Return the blocks of some parameters by columns, [ranks, K, columns of a rank]."""
        number, size = self._jacobian.num_clusters, self._ranks.size
        parts = [self._jacobian.filled(position).reshape(number, -1) for position in bucket]
        columns = sum(part.shape[1] for part in parts)
        width = max(1, -(-columns // size))
        parts.append(parts[0].new_zeros(number, size * width - columns))
        return torch.cat(parts, 1).view(number, size, width).transpose(0, 1).contiguous()

    def drop(self, clusters: Tensor) -> None:
        """Set the gradients of some clusters, bool [K], to zero."""
        for shard in self._shards:
            shard.masked_fill_(clusters.unsqueeze(1), 0)

    def update(self, weights: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        """Add Σ_k w_k g_k to the parameters' ``.grad``; see `Store.update`."""
        parameters, directions = self._jacobian.parameters, dict[int, Tensor]()
        for bucket, shard in zip(self._buckets, self._shards, strict=True):
            dtype = parameters[bucket[0]].dtype
            whole = self._ranks.gather(ops.combine(shard, weights).to(dtype)).view(-1)
            sizes = [parameters[position].numel() for position in bucket]
            for position, part in zip(bucket, whole[: sum(sizes)].split(sizes), strict=True):
                directions[position] = part.view(1, *parameters[position].shape)
        return self._jacobian.add_to_grads(directions, weights.new_ones(1))
