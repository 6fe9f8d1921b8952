"""Which rows of a batch belong to which cluster, and the order of a batch by cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .._host import known_counts, on_host, upload
from .trees import map_tensors, replace_rows


class Clusters:
    """Contiguous clusters of a batch's samples: what a rule is told of them.

    A tensor has one block of rows per sample along dimension 0: [B·m, ...] with the same m for every sample, as
    tokens or video frames folded into the batch have.

    Attributes:
        bounds: where each cluster's samples begin and end, K + 1 numbers.
        num: K, the number of clusters; absent ones have no samples.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds: tuple[int, ...] = tuple(bounds)
        self._scaled: dict[int, tuple[list[int], Tensor]] = {}
        self._of_rows: dict[tuple[int, torch.device], Tensor] = {}
        self.num: int = len(bounds) - 1

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self.bounds[-1]

    def offsets(self, rows: int) -> Tensor:
        """Return where each cluster's rows begin and end: int64 [K + 1] on the CPU.

        Args:
            rows: size of dimension 0, a multiple of the batch size.
        """
        return self._in_rows(rows)[1]

    def placed_offsets(self, rows: int, device: torch.device) -> Tensor:
        """Return the same on a device, where the host does not wait for the copy."""
        return upload(self.offsets(rows), device)

    def sizes(self, rows: int) -> list[int]:
        """Return how many rows each cluster has.

        Args:
            rows: size of dimension 0, a multiple of the batch size.
        """
        bounds, _ = self._in_rows(rows)
        return [end - begin for begin, end in pairwise(bounds)]

    @property
    def present(self) -> list[int]:
        """The clusters that have samples."""
        return [k for k, (begin, end) in enumerate(pairwise(self.bounds)) if begin < end]

    def spans(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Yield (cluster, begin, end) of every present cluster, in rows.

        Args:
            rows: size of dimension 0, a multiple of the batch size.
        """
        bounds, _ = self._in_rows(rows)
        for k in range(self.num):
            if bounds[k] < bounds[k + 1]:
                yield k, bounds[k], bounds[k + 1]

    def of_rows(self, rows: int, device: torch.device) -> Tensor:
        """Return the cluster of every row: int64 [rows] on a device, where the host does not wait for the copy."""
        if (rows, device) not in self._of_rows:
            clusters = torch.arange(self.num).repeat_interleave(torch.tensor(self.sizes(rows)))
            self._of_rows[rows, device] = upload(clusters, device)
        return self._of_rows[rows, device]

    def by_row(self, values: Tensor, rows: int) -> Tensor:
        """Give every row the value of its cluster: [K] → [rows]."""
        return values[self.of_rows(rows, values.device)]

    def _in_rows(self, rows: int) -> tuple[list[int], Tensor]:
        if rows not in self._scaled:
            if rows % self.batch_size:
                raise ValueError(
                    f"expected rows in a multiple of the batch size {self.batch_size}, found {rows} rows"
                )
            bounds = [bound * (rows // self.batch_size) for bound in self.bounds]
            self._scaled[rows] = bounds, torch.tensor(bounds)
        return self._scaled[rows]


class BatchLayout:
    """The order of a batch by cluster.

    Args:
        cluster: int64 [B], the cluster of each sample, in any order. On an accelerator reading it is the one host
            synchronisation of a step, unless the library's samplers drew them on the host.
        num_clusters: K.

    Raises:
        ValueError: a cluster is not in 0..K-1.

    Attributes:
        batch_size: B.
        order: int64 [B], sample indices sorted by cluster, or None if the batch is sorted already.
        clusters: the clusters of the sorted batch.
        whole: the same batch as a single cluster.
    """

    def __init__(self, cluster: Tensor, num_clusters: int) -> None:
        self.batch_size = cluster.shape[0]
        bounds, self.order = _sort(cluster, num_clusters)
        self.clusters, self.whole = Clusters(bounds), Clusters([0, self.batch_size])

    def sort(self, args: tuple[Any, ...], kwargs: dict[str, Any], shared: Collection[str | int]) -> Any:
        """Sort the samples of a call's arguments by cluster; `shared` ones stay as they are."""
        if self.order is None:
            return args, kwargs
        return replace_rows(args, kwargs, self.order, shared=shared)

    def unsort(self, output: Any) -> Any:
        """Put the samples of an output back into the order of the batch."""
        return output if self.order is None else map_tensors(self._taker(self.order.argsort()), output)

    def _taker(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        def take(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != self.batch_size:
                return tensor
            return tensor.index_select(0, upload(index, tensor.device))

        return take


def _sort(cluster: Tensor, k: int) -> tuple[list[int], Tensor | None]:
    """Return where each cluster begins and ends once sorted, and the order that sorts; None if it is sorted."""
    counts = known_counts(cluster)
    if counts is not None:
        _refuse_outside(*_ends(counts), k)
        return list(accumulate(counts + [0] * (k - len(counts)), initial=0)), None
    ordered, order = cluster.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(k + 1, device=cluster.device))
    unsorted = (ordered != cluster).any()
    *read, moved = torch.cat([bounds, unsorted[None]]).tolist()
    if read[0] > 0 or read[k] < len(cluster):  # some come before cluster 0, or after the last one
        _refuse_outside(int(ordered[0]), int(ordered[-1]), k)
    return read, order if moved else None


def check_cluster(cluster: Tensor, k: int) -> None:
    """Refuse anything but clusters [B] in 0..k-1; what only an accelerator knows is left to `BatchLayout`."""
    if not isinstance(cluster, Tensor) or cluster.dtype != torch.int64:
        found = cluster.dtype if isinstance(cluster, Tensor) else type(cluster).__name__
        raise TypeError(f"cluster: expected an int64 tensor [B], found {found}")
    if cluster.dim() != 1 or cluster.shape[0] == 0:
        raise ValueError(f"cluster: expected shape [B] with B >= 1, found {list(cluster.shape)}")
    counts = known_counts(cluster)
    if counts is not None:
        _refuse_outside(*_ends(counts), k)
    elif on_host(cluster):
        low, high = cluster.aminmax()
        _refuse_outside(int(low), int(high), k)


def _ends(counts: list[int]) -> tuple[int, int]:
    """Return the first and the last present cluster."""
    return next(k for k, count in enumerate(counts) if count), len(counts) - 1


def _refuse_outside(low: int, high: int, k: int) -> None:
    if low < 0 or high >= k:
        raise ValueError(f"cluster: expected indices in 0..{k - 1}, found {low}..{high}")
