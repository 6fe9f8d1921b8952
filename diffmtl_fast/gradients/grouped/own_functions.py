"""Lets the engine see a `torch.autograd.Function` of parameters, whose `apply` asks no tensor subclass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .cluster_parameter import find_handles, operate
from .operation import NoRows

Function = type[torch.autograd.Function]


class OwnFunction:
    """A Function's `apply` that hands calls on cluster parameters to their engine.

    Args:
        function: the class.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._apply: Callable[..., Any] = function.apply
        self._apart = functools.partial(_Apart.apply, self._apply)
        self._apart.__name__ = f"{function.__module__}.{function.__qualname__}"  # type: ignore[attr-defined]

    def __get__(self, instance: Any, owner: Function) -> Callable[..., Any]:
        """Return itself for the class; a subclass, which inherits it, has an `apply` of its own."""
        if owner is self._function:
            return self
        above: Any = super(self._function, owner)
        inherited: Callable[..., Any] = above.apply
        return inherited

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the Function."""
        handles = [] if kwargs else find_handles(args)
        if not handles:
            return self._apply(*args, **kwargs)
        try:
            return operate(self._apart, args, kwargs)
        except NoRows:
            if not handles[0].engine.recomputing:
                raise
            return self._apply(*args)  # a checkpoint in a module in slices wants no more than its values


class _Apart(torch.autograd.Function):
    """A Function in a graph of its own. In the model's it would make zeros of the gradient that does not come."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        own = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
        with torch.enable_grad():
            result = function(*own)
        ctx.own, ctx.results = own, result if isinstance(result, tuple) else (result,)
        outputs = tuple(r.detach() if isinstance(r, Tensor) else r for r in ctx.results)
        ctx.mark_non_differentiable(
            *(
                o
                for o, r in zip(outputs, ctx.results, strict=True)
                if isinstance(r, Tensor) and not r.requires_grad
            )
        )
        return outputs if isinstance(result, tuple) else outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(r, g) for r, g in zip(ctx.results, grads, strict=True) if g is not None]
        wanted = [i for i, a in enumerate(ctx.own) if isinstance(a, Tensor) and a.requires_grad]
        found: list[Tensor | None] = [None] * len(ctx.own)
        if given:
            results, gradients = zip(*given, strict=True)
            leaves = [ctx.own[i] for i in wanted]
            parts = torch.autograd.grad(results, leaves, gradients, retain_graph=True, allow_unused=True)
            for i, part in zip(wanted, parts, strict=True):
                found[i] = part
        return None, *found


def can_be_seen(function: Any) -> bool:
    """Tell whether a class is a Function whose `apply` is that of all Functions."""
    return isinstance(function, type) and "apply" not in vars(function)


@contextmanager
def seen(functions: Iterable[Function]) -> Iterator[None]:
    """Let the engine see calls of these Functions for a while."""
    changed = [function for function in functions if "apply" not in vars(function)]
    try:
        for function in changed:
            function.apply = OwnFunction(function)  # type: ignore[method-assign]
        yield
    finally:
        for function in changed:
            del function.apply
