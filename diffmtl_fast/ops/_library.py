"""The `diffmtl` operator library: how an op is defined and where its kernels are dispatched.

Every op has a plain-PyTorch definition, registered for all devices and dtypes; it is the oracle of the tests. A
fused kernel for one device (`"CPU"`, `"CUDA"`) is registered over it with `register_kernels`.

What holds for every op is decided here. Autocast changes none: inputs are taken in the floating dtypes that they
have, which an op may ask to be one for some of them, and an op states the dtype it accumulates and returns. Under
`torch.func.vmap` an op runs once for each entry of the batch. A gradient without a formula is refused with the
reason: forward mode always, the second derivative where the first one is an op of its own (`refuse_autograd`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _torch

_logger = logging.getLogger("diffmtl_fast")

# The library object owns the registrations: they end with it, so it lives as long as the module.
_LIBRARY = torch.library.Library("diffmtl", "DEF")

# Where autocast exists and an op can run.
_AUTOCAST_DEVICES = ("CPU", "CUDA", "XPU", "MPS")

# A plain definition or a kernel: all of an op's have one signature.
Kernel: TypeAlias = Callable[..., Any]

PLAIN: dict[str, Kernel] = {}
"""The plain definition of every op by its name: functions of PyTorch alone, what the kernels are held against."""

# The kernels of a device by the ops' names.
_CPU: dict[str, Kernel] = {}
_CUDA: dict[str, Kernel] = {}

# The ops whose kernel on a device is made of the kernel of another one there: that one, and how.
_MADE_OF: dict[str, tuple[str, Callable[[Kernel], Kernel]]] = {}


def define_op(
    schema: str, *, plain: Callable[..., Any], fake: Callable[..., Any], any_layout: bool = False
) -> Callable[..., Any]:
    """Define ``diffmtl::<schema>`` with its plain definition and its shape function.

    Args:
        schema: the op's schema without namespace, ``"gram(Tensor jacobian) -> Tensor"``.
        plain: the definition in plain PyTorch, used wherever no kernel is registered.
        fake: shape, dtype and device of the result, without data.
        any_layout: whether a compiler may hand over inputs in another order in memory than they were traced in,
            which saves copies: the strides of the result do not depend on theirs.

    Returns:
        The op, ``torch.ops.diffmtl.<name>.default``.
    """
    name = schema.partition("(")[0]
    PLAIN[name] = plain
    tags = [torch.Tag.pt2_compliant_tag, *([torch.Tag.flexible_layout] if any_layout else [])]
    _LIBRARY.define(schema, tags=tuple(tags))
    _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"diffmtl::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.diffmtl, name).default
    for device in _AUTOCAST_DEVICES:
        _LIBRARY.impl(name, functools.partial(_without_autocast, op), f"Autocast{device}")
    torch.library.register_vmap(f"diffmtl::{name}", functools.partial(_one_by_one, op), lib=_LIBRARY)
    return op


def make_kernel_of(name: str, source: str, make: Callable[[Kernel], Kernel]) -> None:
    """Let ``diffmtl::<name>`` have a kernel wherever `source` has one: what `make` makes of that."""
    _MADE_OF[name] = source, make


def define_op_with_out(
    arguments: str, *, plain: Callable[..., None], empty: Callable[..., Tensor]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Define an op that allocates its result, and one that writes it, of which alone kernels are written.

    Args:
        arguments: the schema up to the closing bracket, ``"cluster_sum(Tensor values, Tensor offsets"``.
        plain: the definition of the second op, which takes `out` and `accumulate` behind the arguments.
        empty: how the first one allocates, from the arguments.

    Returns:
        ``diffmtl::<name>`` and ``diffmtl::<name>_out``.
    """
    name, _, rest = arguments.partition("(")

    def allocating(write: Kernel) -> Kernel:
        def run(*args: Any) -> Tensor:
            out = empty(*args)
            write(*args, out, False)
            return out

        return run

    make_kernel_of(name, f"{name}_out", allocating)
    return (
        define_op(f"{arguments}) -> Tensor", plain=allocating(plain), fake=empty, any_layout=True),
        define_op(
            f"{name}_out({rest}, Tensor(a!) out, bool accumulate) -> ()",
            plain=plain,
            fake=lambda *args: None,
            any_layout=True,
        ),
    )


def _without_autocast(op: _torch.OpOverload, *args: Any) -> Any:
    with _torch.DisableAutocast():
        return op(*args)


def _one_by_one(op: _torch.OpOverload, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Run an op for each entry of a vmapped batch and stack what it returns."""
    if info.batch_size == 0:
        raise ValueError(f"{op.name()} under vmap: expected at least one entry, found none")
    for argument, dims, given in zip(_torch.schema(op).arguments, in_dims, args, strict=False):
        if argument.alias_info is None or given is None:
            continue
        if None in (dims if isinstance(dims, (list, tuple)) else [dims]):
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


def kernels_in(*modules: ModuleType) -> dict[str, Kernel]:
    """Return the kernels of a device by the ops' names, which the functions in `modules` have."""
    kernels = {name: vars(module)[name] for module in modules for name in PLAIN if name in vars(module)}
    for name, (source, make) in _MADE_OF.items():
        kernels[name] = make(kernels[source])
    return kernels


def register_kernels(dispatch_key: str, kernels: dict[str, Kernel]) -> None:
    """Use kernels on one device (`"CPU"` or `"CUDA"`) instead of what was used there before."""
    (_CPU if dispatch_key == "CPU" else _CUDA).update(kernels)
    for name, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, dispatch_key, allow_override=True)


def call(op: Callable[..., Any], name: str, tensor: Tensor, *args: Any) -> Any:
    """Call an op whose first argument is `tensor`, and whose other tensors lie beside it and are constants.

    Where all that the dispatcher would do is to hand it to the kernel of the device, the kernel is called at once:
    for few numbers the dispatcher takes more time than the work.
    """
    if (
        type(tensor) is Tensor
        and not tensor.requires_grad
        and not torch.compiler.is_compiling()
        and not _torch.dispatch_modes()
        and not _torch.functorch_transforms_active()
        and not _torch.forward_mode_active()
        and not _torch.autocast_enabled()
        and not torch.jit.is_tracing()
    ):
        kernel = (_CPU if tensor.is_cpu else _CUDA if tensor.is_cuda else {}).get(name)
        if kernel is not None:
            return kernel(tensor, *args)
    return op(tensor, *args)


def register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give ``diffmtl::<name>`` its gradient formula: the callables of `torch.library.register_autograd`.

    The kernel that function makes costs more host time than the rest of an op, fails under `torch.func.grad` and
    gives forward mode a tangent of zero. This one does what those of built-in ops do: it records one node, at the
    innermost level of `torch.func`, which sees to the other levels itself. A list counts in ``needs_input_grad``
    as its tensors.
    """
    op = getattr(torch.ops.diffmtl, name).default
    defaults = tuple(a.default_value if a.has_default_value() else None for a in _torch.schema(op).arguments)
    takes_lists, returns_list = (
        any(isinstance(value.type, torch.ListType) for value in values)
        for values in (_torch.schema(op).arguments, _torch.schema(op).returns)
    )

    def node_forward(ctx: Any, *args: Any) -> Any:
        args = _nest(args) if takes_lists else args
        with _torch.AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return tuple(output) if returns_list else output

    def node_backward(ctx: Any, *grads: Any) -> Any:
        grads = (list(grads),) if returns_list else grads
        with _torch.DisableAutocast():
            if torch.is_grad_enabled():
                by_args = backward(ctx, *grads)
            else:  # no op in it has anything to record
                with _torch.AutoDispatchBelowAutograd():
                    by_args = backward(ctx, *grads)
        if not takes_lists:
            return by_args
        *flat, _ = _flatten(by_args if isinstance(by_args, tuple) else (by_args,))
        return *flat, None

    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise NotImplementedError(f"diffmtl::{name} has no forward-mode gradient: use reverse mode")

    formulas = {"forward": node_forward, "backward": node_backward, "jvp": jvp}
    node: Any = type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in formulas.items()})
    apply = _torch.function_apply(node)

    def record(args: tuple[Any, ...]) -> Any:
        args += defaults[len(args) :]  # the dispatcher drops trailing arguments that equal their defaults
        output = apply(*_flatten(args) if takes_lists else args)
        return list(output) if returns_list else output

    def kernel(*args: Any) -> Any:
        if (torch.is_grad_enabled() and _torch.any_requires_grad(*args)) or _torch.forward_mode_active():
            if not _torch.functorch_transforms_active():
                return record(args)
            with _torch.enable_single_level_autograd_function():
                return record(args)
        with _torch.AutoDispatchBelowAutograd():
            return op(*args)

    _LIBRARY.impl(name, kernel, "Autograd")


def _flatten(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put values and the members of lists into one row, as a node takes them, and behind it the lists' sizes."""
    flat: list[Any] = []
    for value in values:
        flat.extend(value) if isinstance(value, list) else flat.append(value)
    return *flat, [len(value) if isinstance(value, list) else None for value in values]


def _nest(flat: tuple[Any, ...]) -> tuple[Any, ...]:
    """Undo `_flatten`."""
    *members, sizes = flat
    rest = iter(members)
    return tuple(next(rest) if size is None else [next(rest) for _ in range(size)] for size in sizes)


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
    aliases = [argument.alias_info for argument in _torch.schema(op).arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def write(keyset: _torch.DispatchKeySet, *args: Any) -> Any:
        for i in written:
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])
        with _torch.AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & _torch.AFTER_ADINPLACEORVIEW, *args)

    def refuse(keyset: _torch.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and _torch.any_requires_grad(*args):
            raise RuntimeError(f"diffmtl::{name} has no gradient: {why}")
        return write(keyset, *args)

    _LIBRARY.impl(name, refuse, "Autograd", with_keyset=True)
    _LIBRARY.impl(name, write, "ADInplaceOrView", with_keyset=True)  # reached alone in inference mode
