"""Trees of tensors: the nested arguments and outputs of a model, cut and put together along the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from .._host import upload
from .._torch import tree_flatten, tree_unflatten


def flags(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call that choose what the model does: strings, booleans, None."""
    leaves = flatten((args, kwargs))[0]
    return tuple((i, v) for i, v in enumerate(leaves) if v is None or isinstance(v, bool | str))


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


def copied(tensor: Tensor) -> Tensor:
    """Return a copy for a forward that must not count: models may write to their arguments."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


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
        blocks = tensor.reshape(batch_size, -1).index_select(0, upload(source, tensor.device))
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
