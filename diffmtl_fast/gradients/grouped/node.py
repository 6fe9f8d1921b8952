"""The autograd node of an operation that is run by its rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._torch import function_apply, functorch_transforms_active
from ..rules import RuleContext
from ..rules.registry import no_buffer
from ..stores import Store
from .deferred_update import deferred_part
from .delivery import Use, deliver, run_backward, run_forward


class _Apply(torch.autograd.Function):
    """An operation run by its rule."""

    @staticmethod
    def forward(ctx: Any, use: Use, *values: Any) -> Tensor:
        out = run_forward(use, values)
        ctx.save_for_backward(*use.context.to_save)
        use.context.to_save = ()
        ctx.use = use
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # with create_graph=True
            return _backward_once(ctx, grad)
        return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    use = ctx.use
    context, step = use.context, use.forward_pass.step
    store = step.store
    if use.recomputed and store is not None:
        use.engine.refuse_ambiguity(step)
    context.saved_tensors = ctx.saved_tensors
    context.needs_input_grad = ctx.needs_input_grad[1:]
    if store is None:
        step.bypassed = True
        gradients = _plain_gradients(use, context, grad)
    else:
        if store.takes_offers:
            _offer(store, use, context, grad)
        gradients = deliver(use, context, grad, use.layout.clusters, store)
    context.saved_tensors = ()
    return None, *gradients


_backward_once = torch.autograd.function.once_differentiable(_backward)


def _offer(store: Store, use: Use, context: RuleContext, grad: Tensor) -> None:
    """Tell the store what else could form the update of an operation's parameters."""
    wanted = [handle for i, handle in use.handles.items() if context.needs_input_grad[i]]
    positions = {origin for handle in wanted for origin in handle.origins}
    tensors = [tensor for tensor in (grad, *context.saved_tensors) if tensor is not None]
    store.offer(positions, tensors, lambda later: deferred_part(use, context, grad, later))


_apply_node = function_apply(_Apply)


def apply(use: Use, values: list[Any]) -> Tensor:
    """Run an operation by its rule, with a node in the graph."""
    run = _Apply.apply if functorch_transforms_active() else _apply_node
    out: Tensor = run(use, *values)
    return out


def _plain_gradients(use: Use, context: RuleContext, grad: Tensor) -> list[Tensor | None]:
    """Return the gradients that the plain operation would return."""
    gradients = run_backward(use, context, grad, use.layout.whole, no_buffer)
    for position in use.handles:
        found = gradients[position]
        gradients[position] = None if found is None else found[0]
    return gradients
