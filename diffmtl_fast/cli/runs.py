"""What several commands do with a run and with the files that they write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import UserError
from .._files import refuse_special, replacing

if TYPE_CHECKING:
    from ..run.trained_denoiser import TrainedDenoiser


def load_run(run_dir: str, checkpoint: str | None, device: str, **sampling: Any) -> TrainedDenoiser:
    """The averaged weights of a run, to be drawn from with options other than its own where they are not None."""
    from ..run.trained_denoiser import load
    from ..train.config import check
    from ..train.folder import RunFolder

    run = RunFolder(run_dir)
    config = replace(run.read_config(), device=device)
    given = {name: value for name, value in sampling.items() if value is not None}
    config = check(replace(config, sampling=replace(config.sampling, **given)))
    return load(run, config, checkpoint)


def check_target(option: str, path: Path) -> None:
    """Refuse a file that could not be written, before the work that it is for.

    Raises:
        UserError: its folder is missing or read-only, or something other than a file has its name.
    """
    reason = None
    try:
        refuse_special(path)
    except ValueError as error:
        reason = str(error)
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = "its folder is missing"
    elif not os.access(path.parent, os.W_OK):
        reason = "its folder is read-only"
    if reason is not None:
        raise UserError(f"{option}: cannot write {path} ({reason})")


@contextmanager
def writing(option: str, path: Path) -> Iterator[Path]:
    """Write a file that the user named, all of it or nothing.

    Raises:
        UserError: it cannot be written; the message begins with the option.
    """
    try:
        with replacing(path) as aside:
            yield aside
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option}: cannot write {path} ({reason})") from error
