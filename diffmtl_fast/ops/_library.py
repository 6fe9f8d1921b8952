"""The `diffmtl` operator library: how an op is defined and where its kernels are dispatched.

Every op has a plain-PyTorch definition, registered for all devices and dtypes; it is the oracle of the tests. A
fused kernel for one device (`"CPU"`, `"CUDA"`) is registered over it with `register_kernel`.

What holds for every op is decided here. Autocast changes none: inputs of any floating dtypes are taken as they
are, and an op states the dtype it accumulates and returns. Under `torch.func.vmap` an op runs once for each entry
of the batch. A gradient without a formula is refused with the reason: forward mode always, the second derivative
where the first one is an op of its own (`refuse_autograd`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.autograd import supports_tensorlist
from torch._library.utils import is_tensorlist_like_type
from torch.autograd import forward_ad

_logger = logging.getLogger("diffmtl_fast")

# The library object owns the registrations: they end with it, so it lives as long as the module.
_LIBRARY = torch.library.Library("diffmtl", "DEF")

# Where autocast exists and an op can run.
_AUTOCAST_DEVICES = ("CPU", "CUDA", "XPU", "MPS")

# The plain definition of every op by its name.
PLAIN: dict[str, Callable[..., Any]] = {}


def define_op(schema: str, *, plain: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``diffmtl::<schema>`` with its plain definition and its shape function.

    Args:
        schema: the op's schema without namespace, ``"gram(Tensor jacobian) -> Tensor"``.
        plain: the definition in plain PyTorch, used wherever no kernel is registered.
        fake: shape, dtype and device of the result, without data.

    Returns:
        The op, ``torch.ops.diffmtl.<name>.default``.
    """
    name = schema.partition("(")[0]
    PLAIN[name] = plain
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"diffmtl::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.diffmtl, name).default
    for device in _AUTOCAST_DEVICES:
        _LIBRARY.impl(name, _without_autocast(op), f"Autocast{device}")
    torch.library.register_vmap(f"diffmtl::{name}", functools.partial(_one_by_one, op), lib=_LIBRARY)
    return op


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*args)

    return wrapper


def _one_by_one(op: torch._ops.OpOverload, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Run an op for each entry of a vmapped batch and stack what it returns."""
    if info.batch_size == 0:
        raise ValueError(f"{op.name()} under vmap: expected at least one entry, found none")
    for argument, dims in zip(op._schema.arguments, in_dims, strict=False):
        if argument.alias_info is not None and None in (dims if isinstance(dims, (list, tuple)) else [dims]):
            raise ValueError(
                f"{op.name()} under vmap: expected {argument.name}, which it writes, to be batched"
            )
    outputs = [op(*_entry(args, in_dims, i)) for i in range(info.batch_size)]
    if outputs[0] is None:
        return None, None
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    stacked = tuple(torch.stack(entries) for entries in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def _entry(args: Sequence[Any], in_dims: Sequence[Any], i: int) -> list[Any]:
    return [
        arg if dim is None else _entry(arg, dim, i) if isinstance(arg, (list, tuple)) else arg.select(dim, i)
        for arg, dim in zip(args, in_dims, strict=True)
    ]


@functools.cache
def _log_fallback(name: str, reason: str) -> None:
    _logger.info("diffmtl::%s runs its plain definition: %s", name, reason)


def run_plain(name: str, reason: str, *args: Any) -> Any:
    """Run the plain definition where a kernel does not cover an input, and log the reason once."""
    _log_fallback(name, reason)
    return PLAIN[name](*args)


def register_kernel(name: str, dispatch_key: str, kernel: Callable[..., Any]) -> None:
    """Use `kernel` instead of the plain definition on one device (`"CPU"` or `"CUDA"`)."""
    _LIBRARY.impl(name, kernel, dispatch_key)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give ``diffmtl::<name>`` its gradient formula: the callables of `torch.library.register_autograd`.

    The kernel that function makes costs more host time than the rest of an op, fails under `torch.func.grad` and
    gives forward mode a tangent of zero. This one does what those of built-in ops do: it records one node, at the
    innermost level of `torch.func`, which sees to the other levels itself.
    """
    op = getattr(torch.ops.diffmtl, name).default
    schema = op._schema
    defaults = tuple(a.default_value if a.has_default_value() else None for a in schema.arguments)

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise NotImplementedError(f"diffmtl::{name} has no forward-mode gradient: use reverse mode")

    formulas = {"forward": forward, "backward": _without_autocast(backward), "jvp": jvp}
    node: Any = type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in formulas.items()})
    node.apply = super(torch.autograd.Function, node).apply
    if any(is_tensorlist_like_type(argument.type) for argument in (*schema.arguments, *schema.returns)):
        node = supports_tensorlist(node)

    def kernel(*args: Any) -> Any:
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or forward_ad._current_level >= 0:
            args += defaults[len(args) :]  # the dispatcher drops trailing arguments that equal their defaults
            if not torch._C._are_functorch_transforms_active():
                return node.apply(*args)
            with enable_single_level_autograd_function():
                return node.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _LIBRARY.impl(name, kernel, "Autograd")


def refuse_autograd(name: str, why: str) -> None:
    """Make differentiating through ``diffmtl::<name>`` an error that says `why`, instead of a silent zero."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"diffmtl::{name} has no gradient: {why}")

    register_autograd(name, backward, lambda ctx, inputs, output: None)


def refuse_autograd_in_place(name: str, why: str) -> None:
    """Make ``diffmtl::<name>`` an in-place op: what it writes counts as changed, and differentiating is refused.

    PyTorch does both by itself only for its own in-place ops. Without the count, a gradient that needs the values
    from before the write would be wrong without a word.
    """
    op = getattr(torch.ops.diffmtl, name).default
    aliases = [argument.alias_info for argument in op._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def write(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    def refuse(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise RuntimeError(f"diffmtl::{name} has no gradient: {why}")
        return write(keyset, *args)

    _LIBRARY.impl(name, refuse, "Autograd", with_keyset=True)
    _LIBRARY.impl(name, write, "ADInplaceOrView", with_keyset=True)  # reached alone in inference mode
