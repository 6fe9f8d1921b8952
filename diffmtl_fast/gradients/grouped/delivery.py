"""Passes the gradients that a rule forms to the store: written into lent memory, or added afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..batch import BatchLayout, Clusters
from ..rules import Registered, RuleContext
from ..rules.registry import no_buffer
from ..step import Pass
from .cluster_parameter import ClusterParameter, pull_back

if TYPE_CHECKING:
    from .grouped_engine import GroupedEngine


class Use:
    """One use of parameters in a forward.

    Args:
        registered: the rule.
        handles: the parameters, by the position of the argument.
        layout: of the batch.
        engine: the engine that runs it.
        forward_pass: the forward.
        recomputed: whether it was run in backward, to recompute a checkpoint.
    """

    def __init__(
        self,
        registered: Registered,
        handles: dict[int, ClusterParameter],
        layout: BatchLayout,
        engine: GroupedEngine,
        forward_pass: Pass,
        recomputed: bool,
    ) -> None:
        self.registered, self.handles, self.layout, self.engine = registered, handles, layout, engine
        self.forward_pass, self.recomputed = forward_pass, recomputed


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
    wanted: Callable[[int], bool] = lambda origin: True,
) -> list[Tensor | None]:
    """Run an operation's backward and hand the gradients of its parameters on.

    Args:
        use: the operation.
        context: what its forward left.
        grad: of its output.
        clusters: to tell apart.
        target: what takes the gradients of the parameters.
        wanted: tells of a parameter's position whether its gradients are.

    Returns:
        The gradients of the arguments; None for parameters.
    """
    loans: dict[int, Tensor] = {}

    def buffer(position: int) -> Tensor | None:
        handle = use.handles.get(position)
        if position in loans or handle is None or handle.source is not None or not wanted(handle.origins[0]):
            return loans.get(position)
        block = target.lend(handle.origins[0])
        if block is not None:
            loans[position] = block
        return block

    with no_autocast(grad.device.type):
        gradients = list(run_backward(use, context, grad, clusters, buffer))
    settled = _settle(loans, gradients, use.handles, target)
    for position, handle in use.handles.items():
        found, gradients[position] = gradients[position], None
        if found is None or position in settled:
            continue
        parts = [found] if handle.source is None else pull_back(handle, found, use.engine.values)
        for origin, part in zip(handle.origins, parts, strict=True):
            if wanted(origin):
                target.add(origin, part)
    return gradients


def _settle(
    loans: Mapping[int, Tensor],
    gradients: list[Tensor | None],
    handles: Mapping[int, ClusterParameter],
    target: Target,
) -> set[int]:
    """Give lent blocks back before anything is added to them; returns the arguments whose gradients they hold.

    A parameter may be several arguments of one operation, raw in one and computed with in another.
    """
    settled = set()
    for position, block in loans.items():
        if _is(gradients[position], block):
            target.accept(handles[position].origins[0])
            settled.add(position)
        else:
            target.take_back(handles[position].origins[0])
    rest = [i for i in handles if i not in settled and gradients[i] is not None]
    if not rest:
        return settled
    memory = {block.untyped_storage().data_ptr() for block in loans.values()}
    for position in rest:
        found = gradients[position]
        if found is not None and found.untyped_storage().data_ptr() in memory:
            gradients[position] = found.clone()  # a rule returned one argument's memory for another one
    return settled


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
) -> tuple[Tensor | None, ...]:
    """Run a rule's backward, and refuse gradients that lack a parameter's."""
    context._lend = buffer
    try:
        gradients = use.registered.rule.backward(context, grad, clusters)
    finally:
        context._lend = no_buffer
    needed = context.needs_input_grad
    expected = {i: (clusters.num, *handle.value.shape) for i, handle in use.handles.items() if needed[i]}
    use.registered.check_gradients(gradients, expected)
    return gradients


def run_forward(
    registered: Registered, context: RuleContext, values: list[Any], handles: dict[int, ClusterParameter]
) -> Tensor:
    """Run a rule's forward with the parameters cast as its other arguments are."""
    device = values[0].device.type
    if not torch.is_autocast_enabled(device):
        return registered.rule.forward(context, *values)
    for position in handles:
        values[position] = registered.rule.precision(values[position])
    with torch.autocast(device, enabled=False):
        return registered.rule.forward(context, *values)


def no_autocast(device: str) -> Any:
    """Return a context without autocast."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
