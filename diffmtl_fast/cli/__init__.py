"""The command line: ``diffmtl-fast train | encode | sample | evaluate | cluster | samplers | analyze | study``.

A command is a function of its options: jsonargparse makes its parser from the signature and the docstring, and
that of `train` from the configuration's classes. Parsing needs jsonargparse alone; diffusers, scikit-learn and
matplotlib load when a command needs them.

What the user can put right is reported as one line on standard error, with exit status 2; training that diverges
likewise, with exit status 1. ``--traceback`` shows the traceback too. Anything else is a defect and keeps it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from .._errors import TrainingDiverged, UserError, blame, readable
from .._extras import require
from .._number_types import plain
from ..train.config import to_dict
from ..train.folder import RunFolder
from ..train.yaml_text import check_text
from . import analyze, cluster, encode, evaluate, sample, samplers, study, train
from .parsers import parser

DIVERGED, USAGE, INTERRUPTED = 1, 2, 130
TRACEBACK = "--traceback"
LONGEST_WORD, LONGEST_MESSAGE = 200, 2000  # characters; what is longer is cut


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.

    Returns:
        The exit status.
    """
    # Paths need not be text, nor need a terminal know every letter.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        jsonargparse = require("jsonargparse", "train")
    except ImportError as error:
        return _fail(str(error))
    given = list(sys.argv[1:] if arguments is None else arguments)
    shown = TRACEBACK in given
    try:
        with blame("options", (Exception,)), _read_by(jsonargparse):
            command, options = _parse(_underscored([each for each in given if each != TRACEBACK]))
        for path in command(**options) or ():
            print(f"wrote {path}")
        _flush_output()
    except UserError as error:
        return _fail(str(error), shown=shown)
    except TrainingDiverged as error:
        return _fail(str(error), DIVERGED, shown)
    except OSError as error:
        return _fail(
            f"{error.filename or 'standard output or a file'}: {error.strerror or error}", shown=shown
        )
    except MemoryError as error:
        return _fail(f"memory: {error or 'there is not enough of it'}", shown=shown)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted", INTERRUPTED, shown)
    return 0


def _flush_output() -> None:
    """Write what was printed; where it can't be, drop it, lest Python's end tries again."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"standard output: cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def _read_by(jsonargparse: Any) -> Iterator[None]:
    """Put what is wrong with options as the other messages do."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"config: expected text in UTF-8 ({error})") from error
    except RecursionError as error:
        raise UserError("options: expected values that end, found nesting that is too deep") from error
    except jsonargparse.ArgumentError as error:
        raise UserError(readable(str(error))) from error


def commands() -> dict[str, tuple[Any, str]]:
    """The commands by name: a function, or the commands below it, and what it is for.

    A function returns the files that it wrote and that the user is told of, if any.
    """
    return {
        "train": (train.train, "train a model; write weights, pictures and metrics"),
        "encode": (encode.encode, "encode pictures into latents to train on"),
        "sample": (sample.sample, "draw pictures from a run"),
        "evaluate": (evaluate.evaluate, "measure how close a run's pictures come to real ones"),
        "cluster": (cluster.cluster, "group the timesteps of a noise schedule"),
        "samplers": (samplers.samplers, "show which timesteps the samplers of training draw"),
        "analyze": (analyze.ANALYSES, "measure how the denoising tasks of a run agree and differ"),
        "study": (study.study, "train every method and clustering, and report what they gain"),
    }


def _parse(arguments: list[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The command and its options; a run that is resumed has its own as defaults, not the bundled ones."""
    known = commands()
    _check_texts(arguments)
    options = parser(known, __version__).parse_args(arguments)
    if options.command == "train" and options.train.resume:
        run = RunFolder(Path(options.train.run_dir))
        if run.begun:
            options = parser(known, __version__, to_dict(run.read_config())).parse_args(arguments)
    command, given = known[options.command][0], options[options.command]
    if isinstance(command, dict):
        command, given = command[given.subcommand][0], given[given.subcommand]
    return command, plain(given.as_dict())


def _check_texts(arguments: list[str]) -> None:
    """Refuse values and files of options that are no sound YAML, before they are read as such."""
    for before, argument in itertools.pairwise(["", *arguments]):
        name, _, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        with contextlib.suppress(yaml.YAMLError, OSError, UnicodeDecodeError):  # which the parser names
            if name == "--config" and Path(value).is_file():
                check_text(Path(value).read_text(encoding="utf-8"), f"config: {value}")
            elif "*" in value:
                check_text(value, name.removeprefix("--"))


def _underscored(arguments: Sequence[str]) -> list[str]:
    """Let every option be spelt with hyphens too, and ``--run_dir`` in short; the long names are those in YAML."""

    def spell(argument: str) -> str:
        name, sign, value = argument.partition("=")
        if not name.startswith("--"):
            return argument
        name = name[:2] + name[2:].replace("-", "_")
        return ("--run_dir" if name == "--run" else name) + sign + value

    return [spell(argument) for argument in arguments]


def _fail(message: str, status: int = USAGE, shown: bool = False) -> int:
    if shown:
        traceback.print_exc()
    words = re.sub(
        rf"\S{{{LONGEST_WORD},}}", lambda found: f"{found[0][: LONGEST_WORD // 2]}…", message
    ).split()
    line = " ".join(words)
    print(
        "error: " + (line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}…"), file=sys.stderr
    )
    return status
