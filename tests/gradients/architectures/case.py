"""One row of the table: a model, its inputs, and what is expected of the engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: A batch size to an argument of the model.
Argument = Callable[[int], Any]
#: What the grouped engine says of a module or a model that it can't run as a whole: the name, and why.
NO_RULE = (
    r"(engine='grouped'|sliced): (the model itself|[\w.]+)(, [\w.]+)*: "
    r".*(no rule for|expected \[B|with a batch of|unseen by tensor subclasses)"
)
#: The same, whatever the reason.
BY_NAME = r"(engine='grouped'|sliced): (the model itself|[\w.]+)(, [\w.]+)*: "
#: What it says where samples do not lie along dimension 0 of what a module is given.
OTHER_ROWS = (
    r"(engine='grouped'|sliced): [\w.]+(, [\w.]+)*: "
    r"(its rows of dimension 0|found an output|slices of it fail)"
)


@dataclass(frozen=True)
class Case:
    """A model with its inputs; every engine is expected to be exact on it where nothing else is said.

    Attributes:
        name: family and name.
        build: makes the model, in float32.
        args: makes the model's positional arguments.
        kwargs: makes its keyword arguments.
        refused: a pattern that the error of every engine matches.
        slices: a pattern that the error of the grouped engine, or of memory="lean", matches if it refuses; it
            may as well be exact, and "auto" with full memory has to be.
        whole: a pattern that the error of slices matches: the grouped engine has to be exact.
        either: a pattern that the error of any engine matches if it refuses; it may as well be exact.
        output: the tensor [B, ...] of the model's output that the loss is of.
        prepare: called with the model before every step but the first.
        plain: called with the reference's model, whose backward takes what autograd.grad allows.
        sizes: of the batches, one step each.
        random: draws random numbers: they are those of the plain model for sorted batches in float64 alone.
        tolerance: at least, where the model itself rounds.
        floats: the precisions it is run in.
    """

    name: str
    build: Callable[[], nn.Module]
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument]
    refused: str | None = None
    slices: str | None = None
    whole: str | None = None
    either: str | None = None
    output: Callable[[Any], Tensor] = lambda out: out
    prepare: Callable[[nn.Module], None] | None = None
    plain: Callable[[nn.Module], None] | None = None
    sizes: tuple[int, ...] = (6, 6)
    random: bool = False
    tolerance: float = 0.0
    floats: tuple[str, ...] = ("float64", "float32")


class Family:
    """Collects the cases of one module of the table."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cases: list[Case] = []

    def __call__(
        self,
        name: str,
        build: Callable[[], nn.Module],
        *args: Argument,
        kwargs: dict[str, Argument] | None = None,
        **expected: Any,
    ) -> None:
        """Add a case; see `Case`."""
        self.cases.append(Case(f"{self.name}-{name}", build, args, kwargs or {}, **expected))


class Written(nn.Module):
    """A model whose forward is a function of itself and the inputs, with members by name.

    A tuple stands for a parameter of that shape, a tensor for a buffer.
    """

    def __init__(self, function: Callable[..., Any], members: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, tuple):
                setattr(self, name, nn.Parameter(torch.randn(member)))
            elif isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(self, *args, **kwargs)


def written(function: Callable[..., Any], **members: Any) -> Callable[[], nn.Module]:
    """Return what makes a `Written`; modules are given as functions that make them."""

    def build() -> nn.Module:
        made = {
            name: member() if callable(member) and not isinstance(member, Tensor | nn.Module) else member
            for name, member in members.items()
        }
        return Written(function, made)

    return build


def chain(*layers: Callable[[], nn.Module] | Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Return what makes a sequence of layers."""
    return lambda: nn.Sequential(*(layer() for layer in layers))


def rows(*shape: int) -> Argument:
    """Normal numbers [B, *shape]."""
    return lambda size: torch.randn(size, *shape)


def indices(high: int, *shape: int) -> Argument:
    """Indices [B, *shape] below `high`."""
    return lambda size: torch.randint(high, (size, *shape))


def given(value: Any) -> Argument:
    """The same for every batch size."""
    return lambda size: value() if callable(value) else value


def sequence(*shape: int) -> Argument:
    """Normal numbers [shape[0], B, *shape[1:]], whose batch is dimension 1."""
    return lambda size: torch.randn(shape[0], size, *shape[1:])


def clusters_of(order: str, size: int, k: int) -> Sequence[int]:
    """Name the clusters of a batch in an order of the table."""
    spread = [i * k // size for i in range(size)]
    if order == "sorted":
        return spread
    if order == "unsorted":
        return [spread[(5 * i + 3) % size] if size % 5 else spread[(7 * i + 3) % size] for i in range(size)]
    if order == "absent":
        return [0 if c == 0 else k - 1 for c in reversed(spread)]
    assert order == "single"
    return [k - 1 if i == size - 1 else 0 if i else 1 for i in range(size)]
