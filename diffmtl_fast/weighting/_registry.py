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
        options: the parameters of its constructor that a user may set.
        title: in words, for pictures.
        short: the name in tables, where many stand beside each other.
        update: what the update direction is, in a few words.
        year: of publication; methods are listed in this order.
        clip: gradient norm to which its published training clips; 0 for none.
        published_every: for a method with an option `update_every`, its value in the paper of the timestep
            clusters.
        studied: whether the bundled study trains it.
    """

    name: str
    cls: type[Weighting]
    options: tuple[Option, ...]
    title: str
    short: str
    update: str
    year: int = 0
    clip: float = 0.0
    published_every: int | None = None
    studied: bool = False

    @property
    def forms_gramian(self) -> bool:
        """Whether it balances by the Gramian of the cluster gradients, not by the losses."""
        return issubclass(self.cls, GramianWeighting)

    def build(self, num_clusters: int, device: torch.device, seed: int, **options: Any) -> Weighting:
        """Make the weighting of a run.

        Args:
            num_clusters: K.
            device: of its parameters and random numbers.
            seed: of its random numbers.
            **options: values of `options`.

        Raises:
            ValueError: an option is out of range.
        """
        parameters = inspect.signature(self.cls).parameters
        if "num_clusters" in parameters:
            options["num_clusters"] = num_clusters
        if "generator" in parameters:
            options["generator"] = torch.Generator(device).manual_seed(seed)
        return self.cls(**options).to(device)


def _options(cls: type[Weighting]) -> tuple[Option, ...]:
    """The parameters of a constructor that a user may set, each with its first sentence under ``Args``."""
    hints, found = typing.get_type_hints(cls.__init__), []
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in SUPPLIED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        about = re.search(rf"^ +{name}: (.*?)(?:\.|\n\n|\Z)", cls.__doc__ or "", re.DOTALL | re.MULTILINE)
        if parameter.default is parameter.empty or about is None:
            raise ValueError(f"{cls.__name__}: expected a default and a docstring of the option {name}")
        found.append(Option(name, hints[name], parameter.default, " ".join(about[1].split())))
    return tuple(found)


_methods: dict[str, Method] = {}


def register(name: str, *, short: str = "", **about: Any) -> Callable[[_Class], _Class]:
    """Enter a weighting into the registry.

    Args:
        name: see `Method`.
        short: see there; the class's name by default.
        **about: `title`, `update` and what else `Method` has.

    Raises:
        ValueError: the name is taken, or an option of the class lacks a default or a docstring.
    """

    def enter(cls: _Class) -> _Class:
        if name in _methods:
            taken = _methods[name].cls.__name__
            raise ValueError(f"name: expected one that is free, found {name!r} of {taken}")
        _methods[name] = Method(name, cls, _options(cls), short=short or cls.__name__, **about)
        return cls

    return enter


def methods() -> dict[str, Method]:
    """All registered weightings by name, in the order of their publication."""
    return dict(sorted(_methods.items(), key=lambda item: (item[1].year, item[0])))
