"""The registry of weightings: what the command line, the trainer, the study and the documentation know of each."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ._interface import GramianWeighting, LossWeighting

Weighting: typing.TypeAlias = LossWeighting | GramianWeighting
_Class = TypeVar("_Class", bound=type[Weighting])

#: Parameters of a constructor that a run supplies; all others are options with a default.
SUPPLIED = ("num_clusters", "generator")


@dataclass(frozen=True)
class Option:
    """A setting of a weighting.

    Attributes:
        name: of the constructor's parameter.
        type: its annotation.
        default: its default.
        about: its first sentence in the class's docstring.
    """

    name: str
    type: Any
    default: Any
    about: str


@dataclass(frozen=True)
class Method:
    """A registered weighting.

    Attributes:
        name: as typed on the command line.
        cls: the class.
        title: in words, for pictures.
        short: the name in tables, where many stand beside each other; the class's name by default.
        update: what the update direction is, in a few words.
        year: of publication; methods are listed in this order.
        clip: gradient norm to which its published training clips; 0 for none.
        published_every: for a method with an option `update_every`, its value in the paper of the timestep
            clusters.
        studied: whether the bundled study trains it: so are those of the paper of the timestep clusters.
    """

    name: str
    cls: type[Weighting]
    title: str
    short: str
    update: str
    year: int = 0
    clip: float = 0.0
    published_every: int | None = None
    studied: bool = False

    @property
    def options(self) -> tuple[Option, ...]:
        """The parameters of the constructor that a user may set, in their order."""
        hints = typing.get_type_hints(self.cls.__init__)
        found = []
        for name, parameter in inspect.signature(self.cls).parameters.items():
            if name in SUPPLIED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.default is parameter.empty:
                raise ValueError(f"{self.cls.__name__}: expected a default of the option {name}, found none")
            found.append(Option(name, hints[name], parameter.default, _about(self.cls, name)))
        return tuple(found)

    @property
    def call(self) -> str:
        """How the class is called, such as ``NashMTL(update_every=1)``; a required number of clusters is k."""
        required = ["k"] * ("num_clusters" in inspect.signature(self.cls).parameters)
        settings = [f"{option.name}={option.default}" for option in self.options]
        return f"{self.cls.__name__}({', '.join([*required, *settings])})"

    @property
    def forms_gramian(self) -> bool:
        """Whether it balances by the Gramian of the cluster gradients, not by the losses."""
        return issubclass(self.cls, GramianWeighting)

    @property
    def cost(self) -> str:
        """What a training step costs, in words."""
        if not issubclass(self.cls, GramianWeighting):
            return "a plain step"
        pauses = self.cls.needs_gramian is not GramianWeighting.needs_gramian
        return "one forward and backward" + "; a plain step between updates" * pauses

    def build(self, num_clusters: int, device: torch.device, seed: int, **options: Any) -> Weighting:
        """Make the weighting of a run.

        Args:
            num_clusters: K.
            device: of its parameters and random numbers.
            seed: of its random numbers.
            **options: see `options`.

        Raises:
            ValueError: an option is out of range.
        """
        parameters = inspect.signature(self.cls).parameters
        if "num_clusters" in parameters:
            options["num_clusters"] = num_clusters
        if "generator" in parameters:
            options["generator"] = torch.Generator(device).manual_seed(seed)
        return self.cls(**options).to(device)


def _about(cls: type, parameter: str) -> str:
    """The first sentence on a parameter in the ``Args`` of a class's docstring."""
    found = re.search(rf"^ +{parameter}: (.*?)(?:\.|\n\n|\Z)", cls.__doc__ or "", re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"{cls.__name__}: expected a docstring with the option {parameter} under Args")
    return " ".join(found[1].split())


_methods: dict[str, Method] = {}


def register(
    name: str, *, title: str, update: str, short: str = "", **more: Any
) -> Callable[[_Class], _Class]:
    """Enter a weighting into the registry.

    Args:
        name: see `Method`, as for the rest.
        title: see there.
        update: see there.
        short: see there.
        **more: further attributes of `Method`.

    Raises:
        ValueError: the name is taken, or a parameter of the constructor is neither supplied nor has a default.
    """

    def enter(cls: _Class) -> _Class:
        if name in _methods:
            raise ValueError(
                f"name: expected one that is free, found {name!r} of {_methods[name].cls.__name__}"
            )
        method = Method(name, cls, title, short or cls.__name__, update, **more)
        _ = method.options  # refuses what a run could not build
        _methods[name] = method
        return cls

    return enter


def methods() -> dict[str, Method]:
    """All registered weightings by name, in the order of their publication."""
    return dict(sorted(_methods.items(), key=lambda item: (item[1].year, item[0])))
