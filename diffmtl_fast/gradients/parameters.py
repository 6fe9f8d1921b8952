"""Finds a model's trainable parameters and the attributes that hold them, and puts stand-ins there for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._torch import BatchNorm, has_hooks, modules_of, own_parameters, refresh_flat_weights, version


class Slot(NamedTuple):
    """A place in the model where a trainable parameter is looked up; tied weights have several."""

    module: nn.Module
    name: str
    position: int  # in the list of distinct parameters


def find_slots(model: nn.Module) -> tuple[list[Slot], list[nn.Parameter]]:
    """Find the trainable parameters of a model, each once, and all the places where its modules look them up.

    Raises:
        ValueError: there is none, they are on several devices, or a module in training mode mixes the samples of a
            batch.
    """
    slots: list[Slot] = []
    parameters: list[nn.Parameter] = []
    position: dict[int, int] = {}
    for module in modules_of(model):
        if isinstance(module, BatchNorm) and module.training:
            raise ValueError(
                f"model: expected layers that treat each sample by itself, found {type(module).__name__} in "
                f"training mode at '{module_name(model, module)}'; use GroupNorm, or put it into eval mode"
            )
        for name, parameter in own_parameters(module).items():
            if parameter is None or not parameter.requires_grad:
                continue
            if not parameter.is_floating_point():
                where = _join(module_name(model, module), name)
                raise ValueError(
                    f"model: expected real trainable parameters, found {parameter.dtype} at '{where}'; keep "
                    "a real one, and use it by torch.view_as_complex"
                )
            index = position.setdefault(id(parameter), len(parameters))
            if index == len(parameters):
                parameters.append(parameter)
            slots.append(Slot(module, name, index))
    if not parameters:
        raise ValueError("model: expected at least one parameter that requires a gradient, found none")
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        found = sorted(str(device) for device in devices)
        raise ValueError(f"model: expected all trainable parameters on one device, found {found}")
    return slots, parameters


def parameter_names(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    """Return the names of parameters of the model, for messages."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def refuse_hooks(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse gradient hooks of parameters: no gradient that is formed cluster by cluster comes by them.

    Raises:
        ValueError: a parameter has one.
    """
    hooked = {id(p) for p in parameters if has_hooks(p)}
    if hooked:
        names = [name for name, p in model.named_parameters() if id(p) in hooked]
        raise ValueError(
            f"model: expected parameters without gradient hooks, found some at {names}; cluster gradients do not "
            "pass through them, change or read .grad after backward instead"
        )


def fingerprint(slots: Sequence[Slot], parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Tell whether stand-ins made for the parameters, and where they are put, still fit them."""
    return [len(slots), *((id(p), p.data_ptr(), p.dtype, p.device, p.stride()) for p in parameters)]


def grad_versions(parameters: Iterable[Tensor]) -> list[tuple[int, int] | None]:
    """Tell whether anything is written to the parameters' ``.grad`` from one call to the next."""
    return [None if p.grad is None else (id(p.grad), version(p.grad)) for p in parameters]


@contextmanager
def grads_set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the parameters have no ``.grad`` for a while."""
    grads = [p.grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad


def take_gradients(values: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Take the gradients of stand-ins of parameters and of the parameters themselves away, added up."""
    found: list[Tensor | None] = []
    for value, parameter in zip(values, parameters, strict=True):
        grads = [t.grad.to_dense() for t in (value, parameter) if t.grad is not None]
        found.append(sum(grads[1:], grads[0]) if grads else None)
        value.grad = parameter.grad = None
    return found


@contextmanager
def installed(slots: Iterable[Slot], stand_ins: Sequence[Tensor]) -> Iterator[None]:
    """Let the modules see `stand_ins` for their parameters, as `torch.func.functional_call` would.

    That function walks the whole module tree on each call, 2 ms for a small UNet; one step makes several calls.
    """
    changed, recurrent = [], set()
    for module, name, position in slots:
        own: dict[str, Any] = own_parameters(module)
        changed.append((own, name, own[name], position))
        if isinstance(module, nn.RNNBase):
            recurrent.add(module)
    try:
        for own, name, _, position in changed:
            own[name] = stand_ins[position]
        _refresh(recurrent)
        yield
    finally:
        for own, name, original, _ in changed:
            own[name] = original
        _refresh(recurrent)


def _refresh(recurrent: Iterable[nn.RNNBase]) -> None:
    """Let recurrent layers, which keep a list of their parameters, look them up again."""
    for module in recurrent:
        refresh_flat_weights(module)


@contextmanager
def forwards_replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let modules run other functions than their own `forward`."""
    changed = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, original in changed:
            del module.__dict__["forward"]
            if original is not None:
                module.__dict__["forward"] = original


def module_name(model: nn.Module, wanted: nn.Module) -> str:
    """Return the name of a module of the model, for messages."""
    return (
        next((name for name, module in model.named_modules() if module is wanted), "") or "the model itself"
    )


def _join(module: str, name: str) -> str:
    return name if module == "the model itself" else f"{module}.{name}"


def raising_module(model: nn.Module, error: BaseException) -> str:
    """Return the name of the innermost module whose forward an error came from, for messages."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found) or found
        trace = trace.tb_next
    return found or "the model itself"


def parent_of(model: nn.Module, wanted: nn.Module) -> nn.Module | None:
    """Return the module that holds another one; None for the model itself."""
    for module in model.modules():
        if any(child is wanted for child in module.children()):
            return module
    return None
