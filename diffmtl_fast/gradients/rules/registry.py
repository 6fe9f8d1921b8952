"""What a cluster rule is, and the registry of rules by operation.

A rule is written like a `torch.autograd.Function`, but its `backward` takes one more argument, `clusters`, and
returns for each parameter one gradient per cluster, [K, *shape], where an ordinary function returns their sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..._torch import OpOverloadPacket, op_of
from ..batch import Clusters


class NoClusterRule(RuntimeError):
    """An operation has no rule, or not for these arguments; the module that it is in runs in slices instead."""


class WrongRule(TypeError, ValueError):
    """A rule's backward returned something else than `ClusterRule` says."""


def no_buffer(position: int) -> None:
    """Lend no memory."""


class RuleContext:
    """What a rule's `forward` leaves for its `backward`.

    Attributes:
        needs_input_grad: for every argument of `forward`, whether a gradient is wanted.
        saved_tensors: what `save_for_backward` was given.
    """

    # A dictionary is made only for a rule that keeps something else.
    __slots__ = ("__dict__", "_lend", "needs_input_grad", "saved_tensors", "to_save")

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]

    if TYPE_CHECKING:  # whatever else a rule keeps, as on any autograd context

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self) -> None:
        self.to_save: tuple[Tensor | None, ...] = ()
        self._lend: Callable[[int], Tensor | None] = no_buffer

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, as `torch.autograd.Function` does."""
        self.to_save = tensors

    def buffer(self, position: int) -> Tensor | None:
        """Return memory [K, *shape] that the gradients of an argument may be written to and returned, or None."""
        return self._lend(position)


class ClusterRule:
    """How one operation forms its gradients. Subclass it, and register it with `register_cluster_rule`.

    `forward` has the operation's own signature after `ctx`. The operation must treat the samples of a batch one
    by one: dimension 0 of its output holds a block of rows per sample.
    """

    @staticmethod
    def precision(tensor: Tensor) -> Tensor:
        """Cast an argument as autocast, which is enabled, would for this operation; by default not at all."""
        return tensor

    @staticmethod
    def forward(ctx: RuleContext, *args: Any) -> Tensor:
        """Compute the output from arguments cast by `precision`; gradients and autocast are disabled."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """Return one gradient per argument of `forward`, those of parameters as [K, *shape]."""
        raise NotImplementedError


class Registered:
    """A rule with its operation's signature.

    Args:
        operation: the function.
        rule: its rule.

    Raises:
        TypeError: the rule is not as `ClusterRule` says.
    """

    def __init__(self, operation: Callable[..., Any], rule: type[ClusterRule]) -> None:
        if not (isinstance(rule, type) and issubclass(rule, ClusterRule)):
            raise TypeError(f"rule: expected a subclass of ClusterRule, found {rule!r}")
        for method in ("forward", "backward"):
            if getattr(rule, method) is getattr(ClusterRule, method):
                raise TypeError(f"rule: expected {rule.__name__} to define {method}, found none")
        parameters = list(inspect.signature(rule.forward).parameters.values())[1:]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise TypeError(
                f"rule: expected {rule.__name__}.forward to name every argument, found * or ** arguments"
            )
        self.operation = operation
        self.rule = rule
        self._names = [p.name for p in parameters]
        self._index = {name: i for i, name in enumerate(self._names)}
        self._defaults = [p.default for p in parameters]
        # The last argument without a default: where it is given by position, none is missing.
        self._required = max(
            (i + 1 for i, d in enumerate(self._defaults) if d is inspect.Parameter.empty), default=0
        )

    def __str__(self) -> str:
        return f"rule {self.rule.__name__} of {self.operation.__name__}"

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the rule's arguments for a call of the operation."""
        given = len(args)
        if given > len(self._defaults) or (kwargs and not kwargs.keys() <= self._index.keys()):
            raise NoClusterRule(
                f"the rule of {self.operation.__name__} does not know arguments {args, kwargs}"
            )
        values = [*args, *self._defaults[given:]]
        for name, value in kwargs.items():
            values[self._index[name]] = value
        if given < self._required:
            for name, value in zip(self._names, values, strict=True):
                if value is inspect.Parameter.empty:
                    raise NoClusterRule(
                        f"the rule of {self.operation.__name__} expects {name}, found no such argument"
                    )
        return values

    def check_number(self, gradients: Any) -> None:
        """Refuse what a rule's backward returned if it is not one gradient or None for every argument.

        Raises:
            WrongRule: it is not.
        """
        count = len(self._names)
        if not isinstance(gradients, tuple) or len(gradients) != count:
            found = f"{len(gradients)}" if isinstance(gradients, tuple) else type(gradients).__name__
            raise WrongRule(f"{self}: expected a tuple of {count} gradients, one per argument, found {found}")

    def check_gradient(self, position: int, gradient: Tensor | None, shape: tuple[int, ...]) -> None:
        """Refuse what a rule's backward returned for a parameter if it is not its gradients by cluster.

        Args:
            position: of the argument.
            gradient: what was returned for it.
            shape: [K, *shape] of the parameter.

        Raises:
            WrongRule: they are missing, or have another shape.
        """
        if gradient is None or gradient.shape != shape:
            raise WrongRule(
                f"{self}: expected the gradients of {self._names[position]!r} by cluster, {list(shape)}, "
                f"found {None if gradient is None else list(gradient.shape)}"
            )


RULES: dict[Callable[..., Any], Registered] = {}


def register_cluster_rule(
    operation: Callable[..., Any], *, replace: bool = False
) -> Callable[[type[ClusterRule]], type[ClusterRule]]:
    """Register a `ClusterRule` for an operation.

    Args:
        operation: a function that PyTorch dispatches on tensor subclasses: one of `torch`'s or
            `torch.nn.functional`'s, a Python function that begins like those of `torch.nn.functional`, with
            `torch.overrides.handle_torch_function`, or a custom operator: what `torch.library.custom_op` returned,
            or ``torch.ops.namespace.name``. The rule is for all overloads of an operator.
        replace: take the place of the rule that the operation has.

    Returns:
        A decorator for the rule class. It raises TypeError where the class is not as `ClusterRule` says.

    Raises:
        TypeError: `operation` can't be called.
        ValueError: the operation has a rule, and `replace` is not set.
    """
    if not callable(operation):
        raise TypeError(f"operation: expected a function, found {operation!r}")
    called = _called(operation)
    for function in called:
        if function in RULES and not replace:
            raise ValueError(
                f"operation: expected one without a rule, found {RULES[function].rule.__name__} for "
                f"{called[0].__name__}; pass replace=True to replace it"
            )

    def register(rule: type[ClusterRule]) -> type[ClusterRule]:
        registered = Registered(called[0], rule)
        RULES.update(dict.fromkeys(called, registered))
        return rule

    return register


def _called(operation: Any) -> list[Any]:
    """Return the functions that a call of an operation may arrive as: of a custom operator, one per overload."""
    operation = op_of(operation)
    packet = getattr(operation, "overloadpacket", operation)
    if not isinstance(packet, OpOverloadPacket):
        return [operation]
    return [packet, *(getattr(packet, name) for name in packet.overloads())]
