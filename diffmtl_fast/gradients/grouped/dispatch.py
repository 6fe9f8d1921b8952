"""Decides how an operation on a parameter is run: by its rule, or as a tensor computed from parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._torch import is_view, saved_tensors_are_packed
from ..model_state import writes_in_place
from ..parameters import module_name
from ..rules import PER_SAMPLE, NoClusterRule, Registered, registry
from ..rules.broadcast import BROADCASTING, JOINING, LIKE, REPEATING
from ..rules.contraction import as_contraction, contract
from .cluster_parameter import (
    Call,
    ClusterParameter,
    derive,
    find_handles,
    find_tensors,
    find_unseen,
    pull_back,
    repeatable,
    split,
    substitute,
    write,
    written,
)
from .delivery import Use, run_forward
from .node import apply
from .operation import NoRows, Operation, Unseen, Unverified
from .own_functions import can_be_seen

if TYPE_CHECKING:
    from .grouped_engine import GroupedEngine


class Dispatch:
    """Runs the operations that meet a cluster parameter.

    Args:
        engine: the engine whose model is running.
    """

    def __init__(self, engine: GroupedEngine) -> None:
        self._engine = engine

    def operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation with handles among its arguments."""
        if self._engine.layout is None:
            return func(*substitute(args, _value), **substitute(kwargs, _value))
        if torch.is_grad_enabled():
            return self._operate(func, args, kwargs)
        if writes_in_place(func) and isinstance(args[0], ClusterParameter):
            func(*substitute(args, _value), **substitute(kwargs, _value))  # a model that sets its own weights
            return args[0]
        try:  # in a reentrant checkpoint, which will run it again with gradients
            return self._operate(func, args, kwargs)
        except NoRows:  # the model's own no_grad: there is nothing to differentiate
            return func(*substitute(args, _value), **substitute(kwargs, _value))

    def _operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine = self._engine
        if func is torch.einsum and not kwargs and (operands := as_contraction(*args)):
            func, args = contract, operands
        if engine.probe is not None:
            self.check_seen((args, kwargs))
            if engine.probe.alike is not None:
                return self._record(func, args, kwargs)
        registered = registry.RULES.get(func)
        if registered is not None:
            values = self._bind(registered, args, kwargs)
            batch = values[0]
            if isinstance(batch, Tensor) and not isinstance(batch, ClusterParameter):
                handles = {}
                for i, value in enumerate(values):
                    if isinstance(value, ClusterParameter):
                        handles[i] = value
                key = self._key(registered.rule, batch, handles.values())
                if engine.constant and key in engine.constant:
                    return self._derive(func, args, kwargs)
                return self._apply(registered, values, handles, key)
        if func in LIKE and len(args) > 1 and isinstance(args[1], Tensor):
            return self._like(func, args, kwargs)
        used, tensors = split((args, kwargs))
        if tensors:
            return self._broadcast(func, args, kwargs, used, tensors)
        return self._derive(func, args, kwargs)

    def _record(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation as it is, and note what it was given."""
        probe, registered = self._engine.probe, registry.RULES.get(func)
        (used, tensors), batch = split((args, kwargs)), None
        what: Any  # what names the operation among others
        assert probe is not None
        if registered is not None:
            values = self._bind(registered, args, kwargs)
            if isinstance(values[0], Tensor) and not isinstance(values[0], ClusterParameter):
                batch, used, what = values[0], find_handles(values), registered.rule
        if batch is None:
            if not tensors:
                return self._derive(func, args, kwargs)
            batch, what, values = _widest(tensors), _name(func), tensors
        key = self._key(what, batch, used)
        if key in self._engine.constant:
            return self._derive(func, args, kwargs)
        constant = torch.is_grad_enabled() and not any(t.requires_grad for t in tensors)
        probe.record(Operation(key, self._engine.owners(used), find_tensors(values), constant))
        return func(*substitute(args, _value), **substitute(kwargs, _value))

    def _bind(self, registered: Registered, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        try:
            return registered.bind(args, kwargs)
        except NoClusterRule as error:
            raise self._no_rule(registered.operation, args, kwargs, str(error)) from error

    def _apply(
        self,
        registered: Registered,
        values: list[Any],
        handles: dict[int, ClusterParameter],
        key: tuple[Any, ...],
    ) -> Tensor:
        """Run an operation by its rule."""
        engine = self._engine
        plain = values.copy()
        for i, handle in handles.items():
            plain[i] = handle.value
        use = Use(registered, handles, engine)
        if use.autocast:
            for i, value in enumerate(plain):
                if isinstance(value, Tensor) and i not in handles:
                    plain[i] = registered.rule.precision(value)
        try:
            if engine.probe is not None:
                if engine.probe.derivations:
                    self._check_derived(handles)
                with torch.no_grad():
                    out = run_forward(use, plain)
                return engine.probe.disturb(out, self._operation(key, values))
            if self.is_new(key):
                names = {module_name(engine.model, m) for m in engine.owners(handles.values())}
                raise Unverified(registered.operation.__name__, names)
            forward_pass = engine.forward_pass
            assert forward_pass is not None
            if saved_tensors_are_packed() or not torch.is_grad_enabled():
                forward_pass.recomputes = True
            for handle in handles.values():
                forward_pass.used.append(handle.origins)
            return apply(use, plain)
        except NoRows:
            raise
        except NoClusterRule as error:
            raise NoRows(self._operation(key, values), str(error)) from error

    def is_new(self, key: tuple[Any, ...]) -> bool:
        """Tell whether an operation has to be checked; reentrant checkpoints run it again, with gradients."""
        return key not in self._engine.verified and torch.is_grad_enabled()

    def _key(self, what: Any, batch: Tensor | int, handles: Iterable[ClusterParameter]) -> tuple[Any, ...]:
        """Name an operation and the shape of a sample's part in it."""
        assert self._engine.layout is not None
        used = tuple([h.origins if h.source is None else (h.origins, h.shape) for h in handles])
        batch_size = self._engine.layout.batch_size
        return what, used, shape_per_sample(batch, batch_size), batch_size == 1

    def _operation(self, key: tuple[Any, ...], arguments: Any) -> Operation:
        handles, tensors = split(arguments)
        constant = torch.is_grad_enabled() and not any(t.requires_grad for t in tensors)
        return Operation(key, self._engine.owners(handles), tensors, constant)

    def _broadcast(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        used: list[ClusterParameter],
        tensors: list[Tensor],
    ) -> Any:
        """Run an element-wise operation with every parameter given once per row of the batch."""
        widest = _widest(tensors)
        dims, rows = widest.dim(), widest.shape[0] if widest.dim() else 0
        name = _name(func)
        key = self._key(name, widest, used)
        if key in self._engine.constant:
            return self._derive(func, args, kwargs)
        if name in JOINING:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            allowed = isinstance(dim, int) and dim % (dims + (name == "stack")) != 0
        else:
            allowed = name in BROADCASTING
        if not allowed:
            raise self._no_rule(func, args, kwargs, f"no rule for {name}", key)

        def per_row(handle: ClusterParameter) -> Tensor:
            if rows == 0 or not _lacks_rows(handle.value, dims):
                why = f"{name} of {list(handle.value.shape)} with a batch of {dims} dims"
                raise self._no_rule(func, args, kwargs, why, key)
            return self._give_rows(handle, dims, rows, key)

        return func(*substitute(args, per_row), **substitute(kwargs, per_row))

    def _give_rows(self, handle: ClusterParameter, dims: int, rows: int, key: tuple[Any, ...]) -> Tensor:
        """Return a parameter once per row, with so many dimensions in all."""
        copies = self._apply(PER_SAMPLE, [handle, rows], {0: handle}, key)
        extra = dims - handle.value.dim()  # dimensions of the batch that the parameter does not have
        if extra == 0:
            return copies.squeeze(1)
        if extra == 1:
            return copies
        return copies.reshape(rows, *[1] * (extra - 1), *handle.value.shape)

    def _derive(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on parameters and constants alone: it gives a handle, or a batch of copies."""
        if writes_in_place(func) and (written(args[0]) or not isinstance(args[0], ClusterParameter)):
            if torch.is_grad_enabled() and (written(args[0]) or self._is_temporary(args[0])):
                return write(func, args, kwargs, self._engine)
            operation = Operation(
                (func, "into a constant"), self._engine.owners(find_handles((args, kwargs)))
            )
            raise NoRows(operation, f"{_name(func)} writes a parameter into a buffer or a part of a tensor")
        result = func(*substitute(args, _value), **substitute(kwargs, _value))
        if not _has_tensor(result):
            return result
        if getattr(func, "__name__", "") in REPEATING and isinstance(args[0], ClusterParameter):
            assert self._engine.layout is not None
            handle, shape = args[0], result.shape
            key = self._key("repeat", shape[0], (handle,))
            per_sample = shape[0] % self._engine.layout.batch_size == 0 and _lacks_rows(
                handle.value, len(shape)
            )
            if per_sample and key not in self._engine.constant:
                copies = self._give_rows(handle, len(shape), shape[0], key)
                return copies.repeat(1, *(n // m for n, m in zip(shape[1:], copies.shape[1:], strict=True)))
        return derive(Call(func, args, kwargs), result, self._engine)

    def _is_temporary(self, tensor: Any) -> bool:
        """Tell whether a tensor is a constant made in this forward, of which nobody sees a part."""
        plain = type(tensor) is Tensor and tensor.is_leaf and not tensor.requires_grad
        return plain and not is_view(tensor) and not self._engine.holds(tensor)

    def _like(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that asks its second argument only for its shape or type."""
        first, other, *rest = args
        if not isinstance(first, ClusterParameter):
            return func(first, other.value, *rest, **kwargs)
        func, ask = LIKE[func]
        return self._derive(func, (first, *ask(_plain(other)), *rest), kwargs)

    def _check_derived(self, handles: dict[int, ClusterParameter]) -> None:
        """Look whether gradients can be pulled back through the tensors computed from parameters."""
        values = self._engine.values
        for handle in handles.values():
            if handle.source is None:
                continue
            if not repeatable(handle, values):
                raise NoClusterRule("computed from parameters at random, or written to in place")
            try:
                pull_back(handle, torch.ones_like(handle.value).unsqueeze(0), values)
            except RuntimeError as error:
                raise NoClusterRule(f"no gradient can be pulled back to its parameters: {error}") from error

    def check_seen(self, arguments: Any) -> None:
        """Look whether a handle was used unseen on the way to an operation's arguments, or to the outputs.

        Raises:
            NoRows: one was.
            Unseen: one was, in a Function that can be seen.
        """
        assert self._engine.probe is not None
        handles, tensors = split(arguments)
        found = find_unseen([*tensors, *handles], self._engine.probe.visited)
        if found is not None:
            handle, function = found
            if can_be_seen(function) and function not in self._engine.functions:
                raise Unseen(function)
            key = self._key("unseen", 1, (handle,))
            raise NoRows(
                Operation(key, self._engine.owners([handle])),
                "a torch.autograd.Function or C++ takes a parameter itself, unseen by tensor subclasses",
            )

    def _no_rule(
        self, func: Any, args: Any, kwargs: Any, why: str, key: tuple[Any, ...] | None = None
    ) -> NoRows:
        key = key or (func, tuple(h.origins for h in find_handles((args, kwargs))))
        return NoRows(self._operation(key, (args, kwargs)), why)


def shape_per_sample(batch: Tensor | int, batch_size: int) -> tuple[Any, ...]:
    """Return rows per sample and the other sizes of a batch, or of a number of rows: what names its shape."""
    if isinstance(batch, int):
        return (batch / batch_size,)
    shape = batch.shape
    return (shape[0] / batch_size, shape[1:]) if shape else ()


def _widest(tensors: Iterable[Tensor]) -> Tensor:
    widest, *others = tensors
    for tensor in others:
        if (tensor.dim(), tensor.shape[:1]) > (widest.dim(), widest.shape[:1]):
            widest = tensor
    return widest


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _value(handle: ClusterParameter) -> Tensor:
    return handle.value


def _plain(tensor: Tensor) -> Tensor:
    return tensor.value if isinstance(tensor, ClusterParameter) else tensor


def _lacks_rows(parameter: Tensor, dims: int) -> bool:
    """Tell whether a parameter broadcasts over dimension 0 of a batch with so many dimensions."""
    return parameter.dim() < dims or (parameter.dim() == dims > 0 and parameter.shape[0] == 1)


def _has_tensor(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.requires_grad
    return isinstance(result, tuple | list) and any(_has_tensor(item) for item in result)
