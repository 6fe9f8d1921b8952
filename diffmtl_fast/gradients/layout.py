"""Which rows of a batch belong to which cluster, and how batches are sorted, cut and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Clusters:
    """Contiguous clusters of a batch's samples: what a rule is told of them.

    A tensor has one block of rows per sample along dimension 0: [B·m, ...] with the same m for every sample, as
    tokens or video frames folded into the batch have.

    Attributes:
        bounds: where each cluster's samples begin and end, K + 1 numbers.
        num: K, the number of clusters; absent ones have no samples.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = tuple(bounds)
        self._scaled: dict[int, tuple[list[int], Tensor]] = {}
        self.num = len(bounds) - 1

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

    def sizes(self, rows: int) -> list[int]:
        """Return how many rows each cluster has.

        Args:
            rows: size of dimension 0, a multiple of the batch size.
        """
        bounds, _ = self._in_rows(rows)
        return [end - begin for begin, end in pairwise(bounds)]

    def spans(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Yield (cluster, begin, end) of every present cluster, in rows.

        Args:
            rows: size of dimension 0, a multiple of the batch size.
        """
        bounds, _ = self._in_rows(rows)
        for k in range(self.num):
            if bounds[k] < bounds[k + 1]:
                yield k, bounds[k], bounds[k + 1]

    def by_row(self, values: Tensor, rows: int) -> Tensor:
        """Give every row the value of its cluster: [K] → [rows]."""
        sizes = torch.tensor(self.sizes(rows))
        return values.repeat_interleave(sizes.to(values.device), output_size=rows)

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
            synchronisation of a step.
        num_clusters: K.

    Attributes:
        batch_size: B.
        order: int64 [B], sample indices sorted by cluster, or None if the batch is sorted already.
        clusters: the clusters of the sorted batch.
        whole: the same batch as a single cluster.
    """

    def __init__(self, cluster: Tensor, num_clusters: int) -> None:
        counts = torch.bincount(cluster, minlength=num_clusters)
        descents = (cluster[1:] < cluster[:-1]).sum(0, keepdim=True)
        *sizes, unsorted = torch.cat([counts, descents]).tolist()
        self.batch_size = cluster.shape[0]
        self.order = cluster.argsort(stable=True) if unsorted else None
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
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
            return tensor.index_select(0, index.to(tensor.device))

        return take


def flags(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call that choose what the model does: strings, booleans, None."""
    named = [*enumerate(args), *kwargs.items()]
    return tuple((name, value) for name, value in named if value is None or isinstance(value, bool | str))


def flatten(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any], Any]:
    """Flatten nested containers, dataclasses included.

    Returns:
        The leaves, a function that builds the same structure around other leaves, and a structure to compare.
    """
    leaves, spec = tree_flatten(tree)
    parts: list[tuple[Any, int, Callable[[list[Any]], Any] | None]] = []
    flat: list[Any] = []
    for leaf in leaves:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            inner, build, structure = flatten(
                {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
            )
            parts.append(((type(leaf), structure), len(inner), _rebuilder(leaf, build)))
            flat.extend(inner)
        else:
            parts.append((None, 1, None))
            flat.append(leaf)

    def rebuild(new: list[Any]) -> Any:
        rest = iter(new)
        rebuilt = []
        for _, size, build in parts:
            taken = [next(rest) for _ in range(size)]
            rebuilt.append(taken[0] if build is None else build(taken))
        return tree_unflatten(rebuilt, spec)

    return flat, rebuild, (spec, [structure for structure, _, _ in parts])


def _rebuilder(instance: Any, build: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    def rebuild(leaves: list[Any]) -> Any:
        new = object.__new__(type(instance))
        for name, value in build(leaves).items():
            object.__setattr__(new, name, value)  # frozen dataclasses too
        return new

    return rebuild


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a nested structure."""
    leaves, rebuild, _ = flatten(tree)
    return rebuild([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def cut(tree: Any, batch_size: int, begin: int, end: int, *, folded: bool = False) -> Any:
    """Take the samples begin..end of every batched tensor.

    Args:
        tree: nested containers.
        batch_size: B.
        begin: first sample.
        end: one past the last sample.
        folded: also cut tensors that have several rows per sample, [B·m, ...].
    """

    def take(tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows == 0 or (rows % batch_size if folded else rows != batch_size):
            return tensor
        block = rows // batch_size
        return tensor.narrow(0, begin * block, (end - begin) * block)

    return map_tensors(take, tree)


def replace_rows(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    source: Tensor,
    *,
    shared: Collection[str | int] = (),
    folded: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give every sample of a call the arguments of another one.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        source: int64 [B], whose.
        shared: positions and names of arguments that stay as they are.
        folded: also tensors that have several rows per sample, [B·m, ...].
    """
    batch_size = source.shape[0]

    def take(tensor: Tensor) -> Tensor:
        rows = tensor.shape[0] if tensor.dim() else 0
        if rows == 0 or (rows % batch_size if folded else rows != batch_size):
            return tensor
        blocks = tensor.reshape(batch_size, -1).index_select(0, source.to(tensor.device))
        return blocks.reshape(tensor.shape)

    return (
        tuple(a if i in shared else map_tensors(take, a) for i, a in enumerate(args)),
        {name: a if name in shared else map_tensors(take, a) for name, a in kwargs.items()},
    )


def join(slices: list[Any], sizes: list[int], *, folded: bool = False) -> Any:
    """Concatenate the outputs of slices of the batch.

    Args:
        slices: one output per present cluster.
        sizes: the number of samples of each.
        folded: outputs may have several rows per sample.

    Raises:
        ValueError: an output is neither a batch of rows per sample nor the same for every slice.
    """
    flat, rebuilds, structures = zip(*(flatten(output) for output in slices), strict=True)
    if any(structure != structures[0] for structure in structures[1:]):
        raise ValueError(f"model: expected outputs of one structure for all clusters, found {structures}")
    joined = []
    for leaves in zip(*flat, strict=True):
        if isinstance(leaves[0], Tensor):
            _check_rows(leaves, sizes, folded)
            joined.append(torch.cat(leaves))
        elif all(leaf == leaves[0] for leaf in leaves[1:]):
            joined.append(leaves[0])
        else:
            raise ValueError(
                f"model: expected outputs without a batch to be equal for all clusters, found {leaves}"
            )
    return rebuilds[0](joined)


def _check_rows(leaves: tuple[Tensor, ...], sizes: list[int], folded: bool) -> None:
    first = leaves[0].shape[0] // sizes[0] if leaves[0].dim() else 0
    block = first if folded else 1
    if block == 0 or any(
        leaf.dim() == 0 or leaf.shape[0] != block * size for leaf, size in zip(leaves, sizes, strict=True)
    ):
        raise ValueError(
            f"model: expected output tensors of one row per sample ([{sizes[0]}, ...] for a cluster of "
            f"{sizes[0]}), found {list(leaves[0].shape)}"
        )
