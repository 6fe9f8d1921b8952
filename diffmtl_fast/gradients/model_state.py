"""Saves random states, buffers and parameters that a forward may change, and restores them after a check."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import DisableTorchFunctionSubclass, own_buffers


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, where most models draw no random numbers."""
    training = [(m, m.training) for m in module.modules()]
    for m, _ in training:  # not by eval(), which may do more: layers that merge adapters do
        m.training = False
    try:
        yield
    finally:
        for m, mode in training:
            m.training = mode


class BufferSlot(NamedTuple):
    """A place where a module keeps a buffer."""

    module: nn.Module
    name: str


class ModelState:
    """Random states, a model's buffers and numbers of its own, and the parameters that a forward writes to.

    Args:
        model: the model.
        slots: the buffers to keep; default all, and the modules' attributes that are plain numbers or flags.
    """

    def __init__(self, model: nn.Module, slots: Sequence[BufferSlot] | None = None) -> None:
        if slots is None:
            slots = [BufferSlot(m, name) for m in model.modules() for name, _ in own_buffers(m).items()]
            self._attributes = [(m, _plain_attributes(m)) for m in model.modules()]
        else:
            self._attributes = []
        found = [(slot, getattr(slot.module, slot.name)) for slot in slots]
        self._buffers = [(slot, b, b.detach().clone()) for slot, b in found if b is not None]
        self._empty = [slot for slot, b in found if b is None]
        device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
        self._device = device.type
        self._random = RandomState(device)
        self._written: dict[int, tuple[Tensor, Tensor]] = {}  # by memory: a parameter, and a copy of it
        self._dtypes: set[torch.dtype] = set()

    def restore(self) -> None:
        """Put everything back."""
        for slot, buffer, value in self._buffers:
            with torch.no_grad():
                buffer.copy_(value)
            own_buffers(slot.module)[slot.name] = buffer
        for slot in self._empty:
            own_buffers(slot.module)[slot.name] = None
        for module, attributes in self._attributes:
            module.__dict__.update(attributes)
        for parameter, value in self._written.values():
            parameter.data.copy_(value)  # by .data: a graph that waits for its backward is none the wiser
        self._random.restore()

    def changed(self) -> list[BufferSlot]:
        """Return the buffers that have other values now."""
        return [slot for slot, _, value in self._buffers if not _same(getattr(slot.module, slot.name), value)]

    @property
    def drawn(self) -> bool:
        """Whether random numbers have been drawn since."""
        return self._random.drawn

    @contextmanager
    def watching(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Keep a copy of every parameter that the forwards inside are about to write to, for `restore`.

        Also notes in which precision they compute.
        """

        def keep(_: Any, parameter: Tensor) -> bool:
            self._written.setdefault(parameter.data_ptr(), (parameter, parameter.detach().clone()))
            return True

        if torch.is_autocast_enabled(self._device):
            self._dtypes.add(torch.get_autocast_dtype(self._device))
        with ParameterWrites(parameters, keep, self._dtypes):
            yield

    @property
    def writes(self) -> bool:
        """Whether a forward that was watched wrote to parameters."""
        return bool(self._written)

    @property
    def eps(self) -> float:
        """The relative rounding of the lowest precision that was seen in a forward that was watched."""
        return max(
            (torch.finfo(d).eps for d in self._dtypes if d.is_floating_point or d.is_complex), default=0.0
        )


class RandomState:
    """The states of PyTorch's, Python's and NumPy's random numbers.

    Args:
        device: an accelerator whose random state counts, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = self._read()

    def _read(self) -> tuple[Any, ...]:
        accelerator = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), random.getstate(), np.random.get_state(), accelerator  # noqa: NPY002

    def restore(self) -> None:
        """Put them back."""
        host, python, numpy, accelerator = self._states
        torch.set_rng_state(host)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if accelerator is not None:
            torch.cuda.set_rng_state(accelerator, self._device)

    @property
    def drawn(self) -> bool:
        """Whether random numbers have been drawn since."""
        return any(_differ(a, b) for a, b in zip(self._states, self._read(), strict=True))


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_READING = ("__index__", "__int__", "__invert__")


def drawing_module(model: nn.Module, call: Callable[[], Any]) -> str:
    """Return the name of the innermost module that is the first to draw random numbers in a forward."""
    device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    names = {module: name for name, module in model.named_modules()}
    before: dict[nn.Module, RandomState] = {}
    found: list[str] = []

    def note(module: nn.Module, *_: Any) -> None:
        before[module] = RandomState(device)

    def compare(module: nn.Module, *_: Any) -> None:
        if before[module].drawn:
            found.append(names[module])

    hooks = [module.register_forward_pre_hook(note) for module in names]
    hooks += [module.register_forward_hook(compare) for module in names]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return (found[0] if found else "") or "the model itself"


class ParameterWrites(TorchFunctionMode):
    """Sees every operation that is about to write to a parameter's memory.

    Args:
        parameters: the parameters, or tensors that share their memory.
        allow: given the operation and the parameter, whether it is to run; otherwise it returns its target.
        dtypes: takes the dtypes of the results of all operations.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        allow: Callable[[Any, Tensor], bool],
        dtypes: set[torch.dtype] | None = None,
    ) -> None:
        super().__init__()
        self._by_memory: dict[int | None, list[Tensor]] = {}  # several parameters may share one flat memory
        for parameter in parameters:
            if parameter.numel():
                self._by_memory.setdefault(memory(parameter), []).append(parameter)
        self._allow = allow
        self._dtypes = set() if dtypes is None else dtypes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, or not."""
        kwargs = kwargs or {}
        if func == _SET_DATA and memory(args[0]) in self._by_memory:
            raise ValueError(
                "model: expected parameters that a forward writes in place, such as by copy_() under no_grad, "
                "found the .data of one replaced, which stand-ins of it would not see"
            )
        if writes_in_place(func) or "out" in kwargs:
            target = kwargs["out"] if "out" in kwargs else args[0]
            targets = target if isinstance(target, tuple | list) else [target]
            memories = [memory(t) for t in targets if isinstance(t, Tensor)]
            found = [p for m in memories if m is not None for p in self._by_memory.get(m, [])]
            allowed = [self._allow(func, p) for p in found]  # each is asked
            if not all(allowed):
                return target
        result = func(*args, **kwargs)
        if type(result) is Tensor:
            self._dtypes.add(result.dtype)
        return result


def writes_in_place(func: Any) -> bool:
    """Tell by its name whether an operation writes to its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _READING)
    return name.endswith("_") and name not in ("requires_grad_", "retain_grad_")


def written_once(parameters: Sequence[Tensor]) -> ParameterWrites:
    """Return what keeps the slices after the first one from writing to the parameters again."""
    # Looking up rows of a table normalises just these rows, the same however often it is done.
    return ParameterWrites(parameters, lambda func, _: func is torch.embedding_renorm_)


def memory(tensor: Tensor) -> int | None:
    """Name the memory that a tensor lies in; None where it has none of its own, as within torch.vmap."""
    try:
        with DisableTorchFunctionSubclass():
            return tensor.untyped_storage().data_ptr()
    except NotImplementedError:
        return None


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's numbers and flags, such as a counter, but not its mode."""
    plain = (bool, int, float, str, type(None))
    return {n: v for n, v in module.__dict__.items() if isinstance(v, plain) and n != "training"}


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return not torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return not np.array_equal(a, b)
    if isinstance(a, tuple):
        return any(_differ(x, y) for x, y in zip(a, b, strict=True))
    return bool(a != b)


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
