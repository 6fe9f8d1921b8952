"""Parsers from signatures, docstrings and dataclasses."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import docstring_parser
import jsonargparse

from ..train import config

#: By name a function, or the commands below it, and what it is for.
Commands: TypeAlias = dict[str, tuple[Any, str]]


def parser(commands: Commands, version: str, training: dict[str, Any] | None = None) -> Any:
    """The parser of all commands.

    Args:
        commands: see `Commands`.
        version: of the program.
        training: defaults of `train`, by default those of the bundled run.
    """
    top = jsonargparse.ArgumentParser(
        prog="diffmtl-fast",
        description="Train diffusion models as multi-task learning over noise levels. "
        "Options may be spelt with hyphens or underscores.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"diffmtl-fast {version}")
    top.add_argument("--traceback", action="store_true", help="show where an error came from, too")
    _add_commands(top, commands, "command", "", training)
    return top


def _add_commands(
    above: Any,
    commands: Commands,
    dest: str,
    prefix: str,
    training: dict[str, Any] | None = None,
) -> None:
    found = above.add_subcommands(dest=dest, help="one of these; each has its own --help")
    for name, (command, about) in commands.items():
        if isinstance(command, dict):
            below = _new(f"{prefix}{name}", f"{about.capitalize()}; writes to RUN_DIR/analysis.")
            found.add_subcommand(name, below, help=about)
            _add_commands(below, command, "subcommand", f"{name} ")
        else:
            found.add_subcommand(name, _of_function(f"{prefix}{name}", command, training), help=about)


def _new(name: str, description: str) -> Any:
    return jsonargparse.ArgumentParser(
        usage=f"diffmtl-fast {name} [options]",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _of_function(name: str, command: Callable[..., None], training: dict[str, Any] | None) -> Any:
    """The parser of a command; what its signature leaves open is an option of the configuration."""
    about = docstring_parser.parse(inspect.getdoc(command) or "")
    made = _new(name, " ".join(filter(None, [about.short_description, about.long_description])))
    parameters = inspect.signature(command).parameters
    configured = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if configured:
        made.add_argument("--config", action="config", help="YAML file with options; the command line wins")
    flags = [parameter.name for parameter in parameters.values() if parameter.default is False]
    made.add_function_arguments(command, as_group=False, as_positional=False, skip={*flags})
    for flag in flags:
        text = next(each.description for each in about.params if each.arg_name == flag)
        made.add_argument(f"--{flag}", action="store_true", help=text)
    if configured:
        made.add_class_arguments(config.Config)
        made.set_defaults(config.digits() if training is None else training)
        for action in made._actions:
            if action.help == "Path to a configuration file.":
                action.help = argparse.SUPPRESS  # a file per group of options; --config is enough
    return made
