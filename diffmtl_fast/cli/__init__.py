"""The command line: ``diffmtl-fast train | sample | evaluate | cluster | analyze | study``.

A command is a function of its options: jsonargparse makes its parser from the signature and the docstring, and
that of `train` from the configuration's classes. Parsing needs jsonargparse alone; diffusers, scikit-learn and
matplotlib load when a command needs them.

What the user can put right is reported as one line on standard error, with exit status 2; training that diverges
likewise, with exit status 1. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .._extras import require
from ..train.errors import TrainingDiverged, UserError, readable

DIVERGED, USAGE, INTERRUPTED = 1, 2, 130
# The machine's fault or the path's, not the program's.
FILE_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.

    Returns:
        The exit status.
    """
    try:
        jsonargparse = require("jsonargparse", "train")
    except ImportError as error:
        return _fail(str(error))
    try:
        command, options = _parse(_underscored(sys.argv[1:] if arguments is None else arguments))
        command(**options)
    except UnicodeDecodeError as error:
        return _fail(f"config: expected text in UTF-8 ({error})")
    except jsonargparse.ArgumentError as error:
        return _fail(readable(str(error)))
    except UserError as error:
        return _fail(str(error))
    except TrainingDiverged as error:
        return _fail(str(error), DIVERGED)
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        return _fail(f"{error.filename or 'file'}: {error.strerror}")
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", INTERRUPTED)
    return 0


def commands() -> dict[str, tuple[Any, str]]:
    """The commands by name: a function, or the commands below it, and what it is for."""
    from . import analyze, cluster, evaluate, sample, study, train

    return {
        "train": (train.train, "train a model; write weights, pictures and metrics"),
        "sample": (sample.sample, "draw pictures from a run"),
        "evaluate": (evaluate.evaluate, "measure how close a run's pictures come to real ones"),
        "cluster": (cluster.cluster, "group the timesteps of a noise schedule"),
        "analyze": (analyze.ANALYSES, "measure how the denoising tasks of a run agree and differ"),
        "study": (study.study, "train every method and clustering, and report what they gain"),
    }


def _parse(arguments: list[str]) -> tuple[Callable[..., None], dict[str, Any]]:
    """The command and its options; a run that is resumed has its own as defaults, not the bundled ones."""
    from ..train.config import to_dict
    from ..train.folder import RunFolder
    from .parsers import parser

    known = commands()
    options = parser(known, __version__).parse_args(arguments)
    if options.command == "train" and options.train.resume:
        run = RunFolder(Path(options.train.run_dir))
        if run.begun:
            options = parser(known, __version__, to_dict(run.read_config())).parse_args(arguments)
    command, given = known[options.command][0], options[options.command]
    if isinstance(command, dict):
        command, given = command[given.subcommand][0], given[given.subcommand]
    return command, given.as_dict()


def _underscored(arguments: Sequence[str]) -> list[str]:
    """Let every option be spelt with hyphens too, and ``--run_dir`` in short; the long names are those in YAML."""

    def spell(argument: str) -> str:
        name, sign, value = argument.partition("=")
        if not name.startswith("--"):
            return argument
        name = name[:2] + name[2:].replace("-", "_")
        return ("--run_dir" if name == "--run" else name) + sign + value

    return [spell(argument) for argument in arguments]


def _fail(message: str, status: int = USAGE) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status
