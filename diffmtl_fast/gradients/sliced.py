"""The sliced engine: the model runs once per cluster slice, each slice with parameter leaves of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .jacobian import Jacobian

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class _Slot(NamedTuple):
    """A place in the model where a trainable parameter is looked up; tied weights have several."""

    module: nn.Module
    name: str
    position: int  # in the list of distinct parameters


class SlicedEngine:
    """Per-cluster gradients from one forward and one backward in total, exact where samples do not interact.

    Slice k of the batch runs through the model with aliases in the parameters' places: leaves that share the
    parameters' memory and whose `.grad` is row k of the Jacobian. One backward of the summed cluster losses then
    fills J, since the loss of a sample depends on the aliases of its own slice only.

    Args:
        model: the model; its trainable parameters are those that require a gradient at the time of a forward.
        num_clusters: K.
        shared: names of keyword arguments (or positions of positional ones) that are not split along the batch.
    """

    def __init__(self, model: nn.Module, num_clusters: int, shared: Collection[str | int] = ()) -> None:
        self._model = model
        self._num_clusters = num_clusters
        self._shared = frozenset(shared)
        self._slots: list[_Slot] = []
        self._aliases: list[list[Tensor]] = []
        self._key: list[tuple[Any, ...]] = []
        self.parameters: list[nn.Parameter] = []
        self.jacobian: Jacobian | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Jacobian and the aliases behind when copied or pickled: `prepare` makes new ones."""
        return {"_model": self._model, "_num_clusters": self._num_clusters, "_shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_model"], state["_num_clusters"], state["_shared"])  # type: ignore[misc]

    def prepare(self) -> Jacobian:
        """Return the Jacobian, cleared, after renewing it and the aliases if the parameters have changed."""
        self._slots, self.parameters = find_slots(self._model)
        key = [(id(p), p.data_ptr(), p.dtype, p.device, p.stride()) for p in self.parameters]
        if self.jacobian is None or key != self._key:
            check_one_device(self.parameters)
            self._aliases, self.jacobian = [], None  # free the old one before the new one is allocated
            self.jacobian = Jacobian(self.parameters, self._num_clusters)
            self._aliases = [self._make_aliases(row) for row in self.jacobian.views]
            self._key = key
        else:
            self.jacobian.clear()
        return self.jacobian

    def _make_aliases(self, row: list[Tensor]) -> list[Tensor]:
        aliases = [parameter.detach().requires_grad_() for parameter in self.parameters]
        for alias, grad in zip(aliases, row, strict=True):
            alias.grad = grad
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
            with installed(self._slots, self._aliases[k]):
                slices.append(self._model(*part_args, **part_kwargs))
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


def find_slots(model: nn.Module) -> tuple[list[_Slot], list[nn.Parameter]]:
    """Find the trainable parameters of a model, each once, and all the places where its modules look them up.

    Raises:
        ValueError: there is none, or a module in training mode mixes the samples of a batch.
    """
    slots: list[_Slot] = []
    parameters: list[nn.Parameter] = []
    position: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS) and module.training:
            name = next(name for name, candidate in model.named_modules() if candidate is module)
            raise ValueError(
                f"model: expected layers that treat each sample by itself, found {type(module).__name__} in "
                f"training mode at '{name}'; use GroupNorm, or put it into eval mode"
            )
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if id(parameter) not in position:
                position[id(parameter)] = len(parameters)
                parameters.append(parameter)
            slots.append(_Slot(module, name, position[id(parameter)]))
    if not parameters:
        raise ValueError("model: expected at least one parameter that requires a gradient, found none")
    return slots, parameters


@contextmanager
def installed(slots: list[_Slot], aliases: list[Tensor]) -> Iterator[None]:
    """Let the model see `aliases` for its parameters, as `torch.func.functional_call` would.

    That function walks the whole module tree on each call, 2 ms for a small UNet; one step makes K calls.
    """
    originals = [slot.module._parameters[slot.name] for slot in slots]
    try:
        for slot in slots:
            slot.module._parameters[slot.name] = aliases[slot.position]  # type: ignore[assignment]
        yield
    finally:
        for slot, original in zip(slots, originals, strict=True):
            slot.module._parameters[slot.name] = original


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
