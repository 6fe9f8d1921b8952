"""The Jacobian of the whole batch, of which every rank holds some columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops.gram import gram_at_any_scale
from .buckets import in_buckets
from .ranks import Ranks

if TYPE_CHECKING:
    from ..gradients.stores import Jacobian, Rows


class ShardedJacobian:
    """Reads what the gradients of all ranks add up to, as a `Store` is read.

    Gramians of the ranks' own Jacobians can't be added up: the norm of a sum is not the sum of norms. Those of
    disjoint columns of the sum can. So every rank gets the sum of some columns (all-to-all: the parameters, once
    for every cluster that a rank has samples of), its part of the Gramian is added to the others' (K² numbers),
    and its columns of the update are given to all (all-gather: once the parameters). With m clusters on every
    rank that is (m + 1)/2 times what an all-reduce of the gradients moves: just as much where m is 1.

    Args:
        store: this rank's gradients, after its backward: row k is its part of a sum over the ranks.
        ranks: the ranks.
        held: of every rank, the clusters that it has samples of.
        factors: [K], what this rank's rows are to be multiplied by; default 1.
    """

    def __init__(
        self,
        store: Jacobian | Rows,
        ranks: Ranks,
        held: Sequence[Sequence[int]],
        factors: Tensor | None = None,
    ) -> None:
        self._store, self._ranks, self._held = store, ranks, held
        self._factors = factors
        self._buckets: list[list[int]] = []  # positions of the parameters that are exchanged together
        self._shards: list[Tensor] = []  # of every bucket, [K, columns of this rank]

    def gramian(self) -> Tensor:
        """Return J Jᵀ, float64 [K, K], at any scale.

        Raises:
            RuntimeError: a rank failed in its backward.
        """
        store, ranks = self._store, self._ranks
        touched = ranks.share(torch.tensor(store.touched, dtype=torch.float64)).any(0).tolist()
        positions = [position for position, reached in enumerate(touched) if reached]
        kinds = []
        for position in positions:
            dtype, parameter = store.dtype(position), store.parameters[position]
            kinds.append(((dtype, parameter.dtype), store.num_clusters * parameter.numel() * dtype.itemsize))
        self._buckets = [[positions[i] for i in bucket] for bucket in in_buckets(kinds)]
        self._shards = [self._sum(bucket) for bucket in self._buckets]
        if not self._shards:
            return torch.zeros(
                store.num_clusters, store.num_clusters, dtype=torch.float64, device=ranks.device
            )
        gramian = gram_at_any_scale(self._shards)
        ranks.add_([gramian])
        return gramian

    def _sum(self, bucket: list[int]) -> Tensor:
        """Return the sums over the ranks of this rank's columns of some parameters' gradients, [K, columns]."""
        ranks, number = self._ranks, self._store.num_clusters
        columns = sum(self._store.parameters[position].numel() for position in bucket)
        width = max(1, -(-columns // ranks.size))
        received = ranks.exchange(self._cut(bucket, width), [len(clusters) for clusters in self._held])
        wide = torch.promote_types(received[0].dtype, torch.float32)
        total = torch.zeros(number, width, dtype=wide, device=ranks.device)
        # In the order of the ranks: the same bits every time.
        for clusters, rows in zip(self._held, received, strict=True):
            for k, row in zip(clusters, rows, strict=True):
                total[k] += row
        return total

    def _cut(self, bucket: list[int], width: int) -> Tensor:
        """Return the rows of this rank's clusters by columns, [ranks, clusters, width]."""
        store, ranks = self._store, self._ranks
        mine, device = self._held[ranks.rank], ranks.device
        parts = torch.zeros(ranks.size, len(mine), width, dtype=store.dtype(bucket[0]), device=device)
        for at, k in enumerate(mine):
            row = parts.new_zeros(ranks.size * width)
            begin = 0
            for position in bucket:
                end = begin + store.parameters[position].numel()
                gradient = store.row(position, k)
                if gradient is not None:
                    row[begin:end] = gradient.reshape(-1)
                begin = end
            if self._factors is not None:
                row *= self._factors[k].to(row.dtype)
            parts[:, at] = row.view(ranks.size, width)
        return parts

    def drop(self, clusters: Tensor) -> None:
        """Set the gradients of some clusters, bool [K], to zero."""
        for shard in self._shards:
            shard.masked_fill_(clusters.unsqueeze(1), 0)

    def update(self, weights: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        """Add Σ_k w_k g_k to the parameters' ``.grad``; see `Store.update`."""
        parameters, directions = self._store.parameters, dict[int, Tensor]()
        for bucket, shard in zip(self._buckets, self._shards, strict=True):
            dtype = parameters[bucket[0]].dtype
            whole = self._ranks.gather(ops.combine(shard, weights).to(dtype)).view(-1)
            sizes = [parameters[position].numel() for position in bucket]
            for position, part in zip(bucket, whole[: sum(sizes)].split(sizes), strict=True):
                directions[position] = part.view(1, *parameters[position].shape)
        return self._store.add_to_grads(directions, weights.new_ones(1))
