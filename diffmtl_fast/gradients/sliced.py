"""The sliced engine: the model runs once per cluster slice, each slice with parameter leaves of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .jacobian import Jacobian


class SlicedEngine:
    """Per-cluster gradients from one forward and one backward in total, exact where samples do not interact.

    Slice k of the batch runs through `torch.func.functional_call` with aliases of the parameters: leaves that
    share the parameters' memory and whose `.grad` is row k of the Jacobian. One backward of the summed cluster
    losses then fills J, since the loss of a sample depends on the aliases of its own slice only.

    Args:
        model: the model; its trainable parameters are those that require a gradient at the time of a forward.
        num_clusters: K.
        shared: names of keyword arguments (or positions of positional ones) that are not split along the batch.
    """

    def __init__(self, model: nn.Module, num_clusters: int, shared: Collection[str | int] = ()) -> None:
        self._model = model
        self._num_clusters = num_clusters
        self._shared = frozenset(shared)
        self._names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self._aliases: list[dict[str, Tensor]] = []
        self._key: tuple[Any, ...] = ()
        self.jacobian: Jacobian | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Jacobian and the aliases behind when copied or pickled: `prepare` makes new ones."""
        return {"_model": self._model, "_num_clusters": self._num_clusters, "_shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_model"], state["_num_clusters"], state["_shared"])  # type: ignore[misc]

    def prepare(self) -> Jacobian:
        """Return the Jacobian, cleared, after renewing it and the aliases if the parameters have changed."""
        trainable = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("model: expected at least one parameter that requires a gradient, found none")
        key = tuple((name, id(p), p.data_ptr(), p.dtype, p.device, p.stride()) for name, p in trainable)
        if self.jacobian is None or key != self._key:
            check_one_device([p for _, p in trainable])
            self._names, self.parameters = [name for name, _ in trainable], [p for _, p in trainable]
            self.jacobian = None  # free the old one before the new one is allocated
            self.jacobian = Jacobian(self.parameters, self._num_clusters)
            self._aliases = [self._make_aliases(row) for row in self.jacobian.views]
            self._key = key
        else:
            self.jacobian.clear()
        return self.jacobian

    def _make_aliases(self, row: list[Tensor]) -> dict[str, Tensor]:
        aliases = {}
        for name, parameter, grad in zip(self._names, self.parameters, row, strict=True):
            alias = parameter.detach().requires_grad_()
            alias.grad = grad
            aliases[name] = alias
        return aliases

    def forward(self, cluster: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model slice by slice.

        Args:
            cluster: int64 [B], in any order.
            args: positional arguments of the model; tensors [B, ...] in them, nested ones too, are split.
            kwargs: keyword arguments, likewise.

        Returns:
            What the model returns for the whole batch: tensors concatenated in the order of the batch.
        """
        order, sizes = slice_plan(cluster, self._num_clusters)
        split = self._splitter(cluster.shape[0], order, sizes)
        slices = []
        for k, size in enumerate(sizes):
            if size == 0:
                continue
            part_args = tuple(a if i in self._shared else tree_map(split(k), a) for i, a in enumerate(args))
            part_kwargs = {n: a if n in self._shared else tree_map(split(k), a) for n, a in kwargs.items()}
            slices.append(torch.func.functional_call(self._model, self._aliases[k], part_args, part_kwargs))
        present = [size for size in sizes if size > 0]
        return join_outputs(slices, present, None if order is None else order.argsort())

    def _splitter(
        self, batch_size: int, order: Tensor | None, sizes: list[int]
    ) -> Callable[[int], Callable[[Any], Any]]:
        starts = [sum(sizes[:k]) for k in range(len(sizes))]

        def split(k: int) -> Callable[[Any], Any]:
            def take(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != batch_size:
                    return leaf
                if order is None:
                    return leaf.narrow(0, starts[k], sizes[k])
                return leaf.index_select(0, order.narrow(0, starts[k], sizes[k]).to(leaf.device))

            return take

        return split


def slice_plan(cluster: Tensor, num_clusters: int) -> tuple[Tensor | None, list[int]]:
    """Find the slices of a batch; on an accelerator this is the engine's one host synchronisation.

    Returns:
        order: int64 [B], sample indices sorted by cluster, or None if the batch is sorted already.
        sizes: number of samples of each cluster, K integers.
    """
    counts = torch.bincount(cluster, minlength=num_clusters)
    descents = (cluster[1:] < cluster[:-1]).sum(0, keepdim=True)
    *sizes, unsorted = torch.cat([counts, descents]).tolist()
    return (cluster.argsort(stable=True) if unsorted else None), sizes


def join_outputs(slices: list[Any], sizes: list[int], inverse: Tensor | None) -> Any:
    """Concatenate the outputs of the slices and put the samples back into the order of the batch.

    Raises:
        ValueError: an output is neither a batch of one row per sample nor the same for every slice.
    """
    flat, specs = zip(*(tree_flatten(output) for output in slices), strict=True)
    if any(spec != specs[0] for spec in specs[1:]):
        raise ValueError(f"model: expected outputs of one structure for all clusters, found {set(specs)}")
    joined = []
    for leaves in zip(*flat, strict=True):
        if isinstance(leaves[0], Tensor):
            if any(
                leaf.dim() == 0 or leaf.shape[0] != size for leaf, size in zip(leaves, sizes, strict=True)
            ):
                raise ValueError(
                    f"model: expected output tensors of one row per sample ([{sizes[0]}, ...] for a cluster of "
                    f"{sizes[0]}), found {list(leaves[0].shape)}"
                )
            whole = torch.cat(leaves)
            joined.append(whole if inverse is None else whole.index_select(0, inverse.to(whole.device)))
        elif all(leaf == leaves[0] for leaf in leaves[1:]):
            joined.append(leaves[0])
        else:
            raise ValueError(
                f"model: expected outputs without a batch to be equal for all clusters, found {leaves}"
            )
    return tree_unflatten(joined, specs[0])


def check_one_device(parameters: list[nn.Parameter]) -> None:
    """Refuse a model that is spread over several devices."""
    devices = {str(p.device) for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"model: expected all trainable parameters on one device, found {sorted(devices)}")
