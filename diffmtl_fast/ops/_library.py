"""The `diffmtl` operator library: how an op is defined and where its kernels are dispatched.

Every op has a plain-PyTorch definition, registered for all devices and dtypes; it is the oracle of the tests. A
fused kernel for one device (`"CPU"`, `"CUDA"`) is registered over it with `register_kernel`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger("diffmtl_fast")

# The library object owns the registrations: they end with it, so it lives as long as the module.
_LIBRARY = torch.library.Library("diffmtl", "DEF")

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
    return getattr(torch.ops.diffmtl, name).default


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
    """Give ``diffmtl::<name>`` its gradient formula."""
    torch.library.register_autograd(f"diffmtl::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


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
