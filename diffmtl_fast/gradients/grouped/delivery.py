"""Passes the gradients that a rule forms to the store: written into lent memory, or added afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..batch import Clusters
from ..rules import Registered, RuleContext
from ..rules.registry import no_buffer
from .cluster_parameter import ClusterParameter, pull_back

if TYPE_CHECKING:
    from .grouped_engine import GroupedEngine


class Use:
    """One use of parameters in a forward.

    Args:
        registered: the rule.
        handles: the parameters, by the position of the argument.
        engine: the engine that runs it.

    Attributes:
        autocast: whether autocast is enabled in the forward.
        layout: of the batch.
        forward_pass: the forward; None in checks.
        recomputed: whether it was run in backward, to recompute a checkpoint.
        context: what the rule's forward has left.
    """

    __slots__ = (
        "autocast",
        "context",
        "engine",
        "forward_pass",
        "handles",
        "layout",
        "recomputed",
        "registered",
    )

    def __init__(
        self, registered: Registered, handles: dict[int, ClusterParameter], engine: GroupedEngine
    ) -> None:
        assert engine.layout is not None
        self.registered, self.handles, self.engine = registered, handles, engine
        self.autocast = torch.is_autocast_enabled(engine.device)
        self.layout, self.forward_pass = engine.layout, engine.forward_pass
        self.recomputed = engine.recomputing
        self.context = RuleContext()


class Target(Protocol):
    """What gradients of parameters are delivered to; see `Store` for the meaning."""

    def lend(self, position: int) -> Tensor | None:
        """Lend memory for a parameter's first gradients."""

    def accept(self, position: int) -> None:
        """Take the gradients that the lent memory now holds."""

    def take_back(self, position: int) -> None:
        """Take lent memory back that holds nothing of worth."""

    def add(self, position: int, gradients: Tensor) -> None:
        """Add gradients."""


def deliver(
    use: Use,
    context: RuleContext,
    grad: Tensor,
    clusters: Clusters,
    target: Target,
    wanted: Callable[[int], bool] | None = None,
) -> list[Tensor | None]:
    """Run an operation's backward and hand the gradients of its parameters on.

    Args:
        use: the operation.
        context: what its forward left.
        grad: of its output.
        clusters: to tell apart.
        target: what takes the gradients of the parameters.
        wanted: tells of a parameter's position whether its gradients are; default all are.

    Returns:
        The gradients of the arguments; None for parameters.
    """
    handles = use.handles
    loans: dict[int, Tensor] = {}

    def buffer(position: int) -> Tensor | None:
        handle = handles.get(position)
        if position in loans or handle is None or handle.source is not None:
            return loans.get(position)
        origin = handle.origins[0]
        block = target.lend(origin) if wanted is None or wanted(origin) else None
        if block is not None:
            loans[position] = block
        return block

    gradients = run_backward(use, context, grad, clusters, buffer)
    _settle(loans, gradients, handles, target)
    for position, handle in handles.items():
        found = gradients[position]
        if found is None:
            continue
        gradients[position] = None
        parts = [found] if handle.source is None else pull_back(handle, found, use.engine.values)
        for origin, part in zip(handle.origins, parts, strict=True):
            if wanted is None or wanted(origin):
                target.add(origin, part)
    return gradients


def _settle(
    loans: dict[int, Tensor],
    gradients: list[Tensor | None],
    handles: dict[int, ClusterParameter],
    target: Target,
) -> None:
    """Give lent blocks back before anything is added to them, and take the gradients that they hold off the list.

    A parameter may be several arguments of one operation, raw in one and computed with in another.
    """
    for position, block in loans.items():
        origin = handles[position].origins[0]
        if _is(gradients[position], block):
            target.accept(origin)
            gradients[position] = None
        else:
            target.take_back(origin)
    memory: set[int] = set()
    for position in handles:
        found = gradients[position]
        if found is None or not loans:
            continue
        memory = memory or {block.untyped_storage().data_ptr() for block in loans.values()}
        if found.untyped_storage().data_ptr() in memory:
            gradients[position] = found.clone()  # a rule returned one argument's memory for another one


def _is(gradient: Tensor | None, block: Tensor) -> bool:
    """Tell whether a gradient is in a block's memory, element by element."""
    if gradient is block or gradient is None:
        return gradient is block
    return gradient.data_ptr() == block.data_ptr() and gradient.stride() == block.stride()


def run_backward(
    use: Use,
    context: RuleContext,
    grad: Tensor,
    clusters: Clusters,
    buffer: Callable[[int], Tensor | None],
) -> list[Tensor | None]:
    """Run a rule's backward without autocast, and refuse gradients that lack a parameter's."""
    backward = use.registered.rule.backward
    context._lend = buffer
    try:
        if torch.is_autocast_enabled(use.engine.device):
            with torch.autocast(use.engine.device, enabled=False):
                gradients = backward(context, grad, clusters)
        else:
            gradients = backward(context, grad, clusters)
    finally:
        context._lend = no_buffer
    use.registered.check_number(gradients)
    for position, handle in use.handles.items():
        if context.needs_input_grad[position]:
            shape = (clusters.num, *handle.value.shape)
            use.registered.check_gradient(position, gradients[position], shape)
    return list(gradients)


def run_forward(use: Use, values: Sequence[Any]) -> Tensor:
    """Run a rule's forward with the parameters cast as its other arguments are."""
    rule, context = use.registered.rule, use.context
    if not use.autocast:
        return rule.forward(context, *values)
    cast = [rule.precision(value) if i in use.handles else value for i, value in enumerate(values)]
    with torch.autocast(use.engine.device, enabled=False):
        return rule.forward(context, *cast)
