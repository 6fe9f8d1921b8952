"""Cluster parameters: what a module finds in a parameter's place while the grouped engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._torch import (
    DisableTorchFunctionSubclass,
    function_of,
    make_subclass,
    tree_flatten,
    tree_unflatten,
    version,
)
from ..step import nodes
from ..uncompiled import uncompiled

if TYPE_CHECKING:
    from .grouped_engine import GroupedEngine


# A compiled function's backward would hand its parameters the gradients of all clusters at once.
_REASON = (
    "ClusteredMTL's grouped engine runs compiled functions of parameters operation by operation; with "
    "fullgraph=True they need engine='sliced'"
)


class ClusterParameter(Tensor):
    """A parameter, or a tensor computed from parameters alone, that sends every use of it to the engine.

    Attributes:
        value: the parameter itself, or the computed tensor with its graph.
        origins: the positions of the parameters that it is computed from.
        source: the call that computed it, and which of the call's results it is; None for a parameter.
        engine: who decides what a use of it means.
    """

    value: Tensor
    origins: tuple[int, ...]
    source: tuple[Call, int] | None
    engine: GroupedEngine

    @staticmethod
    def make(
        value: Tensor, origins: tuple[int, ...], source: tuple[Call, int] | None, engine: GroupedEngine
    ) -> ClusterParameter:
        """Wrap a tensor; the handle shares its memory."""
        return _become(make_subclass(ClusterParameter, value.detach(), True), value, origins, source, engine)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hand the operation to the engine."""
        if torch.compiler.is_compiling():
            return uncompiled(operate, _REASON)(func, args, kwargs or {})
        return operate(func, args, kwargs or {})


def operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand an operation with handles among its arguments to the engine."""
    with DisableTorchFunctionSubclass():
        for handle in args:  # where they nearly always are
            if isinstance(handle, ClusterParameter):
                break
        else:
            handle = find_handles((args, kwargs))[0]
        return handle.engine.dispatch.operate(func, args, kwargs)


def _refuse_gradient(handle: Tensor) -> None:
    """Stop a backward that hands a handle a gradient: it is one of all clusters, and the parameter's is lost."""
    assert isinstance(handle, ClusterParameter)
    with DisableTorchFunctionSubclass():
        handle.grad = None
    handle.engine.refuse_unseen(handle)


def find_unseen(tensors: Iterable[Tensor], visited: set[Any]) -> tuple[ClusterParameter, Any] | None:
    """Return a handle at which the tensors' graphs end, if there is one, and the Function that was applied to it.

    Its use was not seen by the engine: `torch.autograd.Function.apply` and functions bound from C++ take a handle
    for the tensor that it shares memory with.

    Args:
        tensors: the tensors.
        visited: the nodes that were looked at before; these are added.
    """
    for tensor in tensors:
        for node in nodes(tensor, visited):
            for before, _ in node.next_functions:
                leaf = getattr(before, "variable", None)
                if isinstance(leaf, ClusterParameter):
                    return leaf, function_of(node)
    return None


def _become(
    handle: Tensor,
    value: Tensor,
    origins: tuple[int, ...],
    source: tuple[Call, int] | None,
    engine: GroupedEngine,
) -> ClusterParameter:
    assert isinstance(handle, ClusterParameter)
    handle.value, handle.origins, handle.source, handle.engine = value, origins, source, engine
    with DisableTorchFunctionSubclass():
        handle.register_post_accumulate_grad_hook(_refuse_gradient)
    return handle


class Call:
    """A call of a function on handles and constants, remembered to be repeated with other parameters.

    Args:
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self._device = find_handles((args, kwargs))[0].device.type
        self._enabled = torch.is_autocast_enabled(self._device)
        self._dtype = torch.get_autocast_dtype(self._device)
        self._written = self._versions()

    def _versions(self) -> list[int]:
        """Tell whether anything has been written to what the call was given."""
        handles, tensors = split((self.args, self.kwargs))
        given = [*tensors, *(handle.value for handle in handles)]
        return [version(tensor) for tensor in given if not tensor.is_inference()]

    def refuse_changes(self) -> None:
        """Refuse to repeat a call whose arguments have been written to since.

        Raises:
            RuntimeError: they have.
        """
        if self._versions() != self._written:
            name = getattr(self.func, "__name__", str(self.func))
            raise RuntimeError(
                f"model: expected parameters and buffers as they were in the forward, found that what {name} was "
                "given has been written to since; use engine='sliced'"
            )

    def run(self, value: Callable[[ClusterParameter], Tensor]) -> Any:
        """Call the function as it was called then, with values in the handles' places."""
        with torch.autocast(self._device, self._dtype, self._enabled, cache_enabled=False):
            return self.func(*substitute(self.args, value), **substitute(self.kwargs, value))


def find_handles(tree: Any) -> list[ClusterParameter]:
    """Return the handles in a call's arguments."""
    return split(tree)[0]


def find_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in a call's arguments that are no handles."""
    return split(tree)[1]


def split(tree: Any) -> tuple[list[ClusterParameter], list[Tensor]]:
    """Return the handles in a call's arguments, and the tensors that are none."""
    handles: list[ClusterParameter] = []
    tensors: list[Tensor] = []
    _gather(tree, handles, tensors)
    return handles, tensors


def _gather(tree: Any, handles: list[ClusterParameter], tensors: list[Tensor]) -> None:
    if isinstance(tree, ClusterParameter):
        handles.append(tree)
    elif isinstance(tree, Tensor):
        tensors.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _gather(item, handles, tensors)
    elif isinstance(tree, dict):
        for item in tree.values():
            _gather(item, handles, tensors)


def substitute(tree: Any, replace: Callable[[ClusterParameter], Tensor]) -> Any:
    """Replace the handles in a call's arguments."""
    if isinstance(tree, ClusterParameter):
        return replace(tree)
    if isinstance(tree, (tuple, list)):
        items = [substitute(item, replace) for item in tree]
        make = getattr(tree, "_make", tree.__class__)  # named tuples; torch.Size is a tuple like any other
        return make(items)
    if isinstance(tree, dict):
        return {name: substitute(item, replace) for name, item in tree.items()}
    return tree


def derive(call: Call, result: Any, engine: GroupedEngine) -> Any:
    """Wrap the tensors among a call's results that depend on parameters.

    Args:
        call: a call on handles and on tensors that do not require a gradient.
        result: what it returned.
        engine: see `ClusterParameter`.
    """
    origins = tuple(dict.fromkeys(o for h in find_handles((call.args, call.kwargs)) for o in h.origins))
    leaves, spec = tree_flatten(result)
    wrapped = [
        ClusterParameter.make(leaf, origins, (call, index), engine)
        if isinstance(leaf, Tensor) and leaf.requires_grad
        else leaf
        for index, leaf in enumerate(leaves)
    ]
    return tree_unflatten(wrapped, spec)


def write(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], engine: GroupedEngine
) -> Any:
    """Let a call write to its first argument: a constant, which is a handle from then on, or such a handle."""
    target, *rest = args
    before = target.detach().clone()
    if written(target):
        before = ClusterParameter.make(target.value, target.origins, target.source, engine)
    call = Call(_Written(func), (before, *rest), kwargs)
    value = call.run(_value)
    with torch.no_grad():
        target.copy_(value)
    origins = tuple(dict.fromkeys(o for h in find_handles((call.args, kwargs)) for o in h.origins))
    if not written(target):
        target.__class__ = ClusterParameter
        with DisableTorchFunctionSubclass():
            target.requires_grad_()
    return _become(target, value, origins, (call, 0), engine)


class _Written:
    """What a function that writes to its first argument makes of it, as a new tensor."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = func

    def __call__(self, target: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """Return it."""
        copy = target.clone()
        self._func(copy, *rest, **kwargs)
        return copy


def written(handle: Any) -> bool:
    """Tell whether a handle was a constant that parameters were written to."""
    return (
        isinstance(handle, ClusterParameter)
        and handle.source is not None
        and isinstance(handle.source[0].func, _Written)
    )


def _value(handle: ClusterParameter) -> Tensor:
    return handle.value


def evaluate(handle: ClusterParameter, parameters: Mapping[int, Tensor]) -> Tensor:
    """Compute a handle's value again from other values of its parameters."""
    results: dict[int, list[Any]] = {}

    def value(of: ClusterParameter) -> Tensor:
        if of.source is None:
            return parameters[of.origins[0]]
        call, index = of.source
        if id(call) not in results:
            results[id(call)] = tree_flatten(call.run(value))[0]
        found: Tensor = results[id(call)][index]
        return found

    return value(handle)


def repeatable(handle: ClusterParameter, parameters: Sequence[Tensor]) -> bool:
    """Tell whether a derived tensor comes out the same again; not if it is random or was written to in place."""
    with torch.no_grad():
        again = evaluate(handle, {o: parameters[o] for o in handle.origins})
    return torch.equal(again, handle.value.detach())


def _refuse_changes(handle: ClusterParameter) -> None:
    if handle.source is not None:
        call, _ = handle.source
        call.refuse_changes()
        for given in find_handles((call.args, call.kwargs)):
            _refuse_changes(given)


def pull_back(handle: ClusterParameter, gradients: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Turn gradients [K, ...] of a derived tensor into those of its parameters, in the order of its origins."""
    _refuse_changes(handle)
    # This small graph is no part of the model's: a checkpoint around the model must not pack its tensors.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        leaves = {o: parameters[o].detach().requires_grad_() for o in handle.origins}
        out = evaluate(handle, leaves)

        def of_cluster(gradient: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                out,
                list(leaves.values()),
                gradient,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

        found = torch.vmap(of_cluster)(gradients.to(out.dtype))
    return list(found)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
