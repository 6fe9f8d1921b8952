"""The Jacobian of the whole batch, of which every rank holds some columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops.gram import gram_at_any_scale
from .buckets import Departures, Workspace, in_order_of_backward
from .ranks import Ranks, Started

if TYPE_CHECKING:
    from ..gradients.stores import Jacobian, Rows

#: Buckets that may be under way: where the network is slower than the backward, this bounds their memory.
MOST_UNDER_WAY = 4


@dataclass(frozen=True)
class _Bucket:
    """Parameters whose gradients are exchanged together.

    Attributes:
        positions: of the parameters.
        parts: what this rank sends, [ranks, its clusters, columns of a rank].
        received: what it gets, [clusters of all ranks, columns of a rank].
        exchange: that goes on.
    """

    positions: Sequence[int]
    parts: Tensor
    received: Tensor
    exchange: Started


class ShardedJacobian:
    """Reads what the gradients of all ranks add up to, as a `Store` is read.

    Gramians of the ranks' own Jacobians can't be added up: the norm of a sum is not the sum of norms. Those of
    disjoint columns of the sum can. So every rank gets the sum of some columns (all-to-all: the parameters, once
    for every cluster that a rank has samples of), its part of the Gramian is added to the others' (K² numbers),
    and its columns of the update are given to all (all-gather: once the parameters). With m clusters on every
    rank that is (m + 1)/2 times what an all-reduce of the gradients moves: just as much where m is 1.

    Buckets of parameters are sent while the backward goes on, each as soon as the store tells that it is complete,
    and the rest afterwards. What is sent with what, and the order of sums, do not depend on when.

    Args:
        store: this rank's gradients: row k is its part of a sum over the ranks.
        ranks: the ranks.
        held: of every rank, the clusters that it has samples of.
        workspace: memory of the exchanges.
        factors: [K], what this rank's rows are to be multiplied by; default 1.
    """

    def __init__(
        self,
        store: Jacobian | Rows,
        ranks: Ranks,
        held: Sequence[Sequence[int]],
        workspace: Workspace,
        factors: Tensor | None = None,
    ) -> None:
        self._store, self._ranks, self._held = store, ranks, held
        self._workspace, self._factors = workspace, factors
        self._failed = False
        most, kinds = max(map(len, held)), []
        for position, parameter in enumerate(store.parameters):
            dtype = store.dtype(position)
            kinds.append(((dtype, parameter.dtype), most * parameter.numel() * dtype.itemsize))
        self._departures = Departures(in_order_of_backward(kinds), self._send)
        self._under_way: list[_Bucket] = []
        self._shards: list[tuple[Sequence[int], Tensor]] = []  # [K, columns of this rank] of every bucket
        self._touched: list[bool] = []

    def complete(self, position: int) -> None:
        """Hear that a parameter's gradients are complete, at most once a step.

        Raises:
            RuntimeError: an exchange failed.
        """
        self._departures.complete(position)

    def fail(self, error: Exception) -> None:
        """Tell the other ranks of an error in the backward, in the exchanges that they wait in.

        Raises:
            RuntimeError: always.
        """
        self._failed = True
        self._finish()
        self._settle(torch.zeros(self._store.num_clusters**2), f"{type(error).__name__}: {error}")

    def gramian(self) -> Tensor:
        """Return J Jᵀ, float64 [K, K], at any scale.

        Raises:
            RuntimeError: a rank failed in its backward.
        """
        self._finish()
        number = self._store.num_clusters
        shards = [shard for _, shard in self._shards]
        return self._settle(gram_at_any_scale(shards).flatten(), None).view(number, number)

    def _settle(self, gramian: Tensor, failure: str | None) -> Tensor:
        total, self._touched = self._ranks.add_with_flags(gramian, self._store.touched, failure)
        return total

    def _send(self, positions: Sequence[int]) -> None:
        columns = sum(self._store.parameters[position].numel() for position in positions)
        width, size = max(1, -(-columns // self._ranks.size)), self._ranks.size
        rows, dtype = [len(clusters) for clusters in self._held], self._store.dtype(positions[0])
        parts = self._take(size, rows[self._ranks.rank], width, dtype=dtype)
        received = self._take(sum(rows), width, dtype=dtype)
        if self._failed:
            parts.zero_()
        else:
            self._fill(parts, positions)
        exchange = self._ranks.start_exchange(parts, received, rows)
        self._under_way.append(_Bucket(positions, parts, received, exchange))
        while self._under_way and (
            len(self._under_way) > MOST_UNDER_WAY or self._under_way[0].exchange.is_over()
        ):
            self._add_up(self._under_way.pop(0))

    def _finish(self) -> None:
        self._departures.flush()
        while self._under_way:
            self._add_up(self._under_way.pop(0))

    def _fill(self, parts: Tensor, positions: Sequence[int]) -> None:
        """Write the rows of this rank's clusters, cut by columns into one part for every rank."""
        store, mine = self._store, self._held[self._ranks.rank]
        begin = 0
        for position in positions:
            end = begin + store.parameters[position].numel()
            for at, k in enumerate(mine):
                row = store.row(position, k)
                flat = None if row is None else row.reshape(-1)
                for part, low, high in _cut(parts[:, at], begin, end):
                    if flat is None:
                        part.zero_()
                    else:
                        part.copy_(flat[low - begin : high - begin])
            begin = end
        if self._factors is not None:
            for at, k in enumerate(mine):
                parts[:, at] *= self._factors[k].to(parts.dtype)
        for padding, _, _ in _cut(parts.transpose(1, 2), begin, parts.shape[0] * parts.shape[2]):
            padding.zero_()

    def _add_up(self, bucket: _Bucket) -> None:
        """Add the ranks' rows of every cluster up, in the order of the ranks: the same bits every time."""
        bucket.exchange.wait()
        received = bucket.received
        wide = torch.promote_types(received.dtype, torch.float32)
        total = self._take(self._store.num_clusters, received.shape[1], dtype=wide)
        rows, begun = iter(received), set[int]()
        for k in (k for clusters in self._held for k in clusters):
            if k in begun:
                total[k] += next(rows)
            else:
                total[k] = next(rows)
                begun.add(k)
        for k in set(range(len(total))) - begun:
            total[k].zero_()
        self._shards.append((bucket.positions, total))
        self._workspace.give_back(bucket.parts, received)

    def drop(self, clusters: Tensor) -> None:
        """Set the gradients of some clusters, bool [K], to zero."""
        for _, shard in self._shards:
            shard.masked_fill_(clusters.unsqueeze(1), 0)

    def update(self, weights: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        """Add Σ_k w_k g_k to the parameters' ``.grad``; see `Store.update`."""
        parameters, directions, gathered = self._store.parameters, dict[int, Tensor](), []
        for positions, shard in self._shards:
            part = ops.combine(shard, weights).to(parameters[positions[0]].dtype)
            whole = self._take(self._ranks.size, len(part), dtype=part.dtype)
            gathered.append((whole, self._ranks.start_gather(part, whole)))
        for (positions, _), (whole, exchange) in zip(self._shards, gathered, strict=True):
            exchange.wait()
            sizes = [parameters[position].numel() for position in positions]
            for position, part in zip(positions, whole.view(-1)[: sum(sizes)].split(sizes), strict=True):
                if self._touched[position]:
                    directions[position] = part.view(1, *parameters[position].shape)
        square = self._store.add_to_grads(directions, weights.new_ones(1))
        self._workspace.give_back(*(shard for _, shard in self._shards), *(whole for whole, _ in gathered))
        return square

    def _take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._workspace.take(shape, dtype, self._ranks.device)


def _cut(parts: Tensor, begin: int, end: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the pieces of columns begin to end of parts [ranks, width, ...], each with its columns."""
    width = parts.shape[1]
    while begin < end:
        rank, column = divmod(begin, width)
        until = min(end, (rank + 1) * width)
        yield parts[rank, column : column + until - begin], begin, until
        begin = until
