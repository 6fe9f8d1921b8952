"""Files and folders that are whole or absent: written aside, synced to disk, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file or a folder so that a crash leaves the old one or the new one, never a part.

    Args:
        target: the path to write. Its parent exists.

    Yields:
        A path beside it, with the same suffix, to be written as a file or created as a folder.

    Raises:
        ValueError: the path is a device, a pipe or a socket, which a renamed file would put an end to.
    """
    refuse_special(target)
    aside = target.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{target.name}")
    _remove(aside)
    try:
        yield aside
        _sync_tree(aside)
        if target.is_dir():
            # A folder cannot be renamed over another one. The old one gets a temporary name first, so that
            # a crash while it is deleted leaves nothing that looks like a whole folder.
            old = target.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-old-{target.name}")
            os.replace(target, old)
            os.replace(aside, target)
            _remove(old)
        else:
            os.replace(aside, target)
        _sync(target.parent)
    finally:
        _remove(aside)


def refuse_special(target: Path) -> None:
    """Refuse to put a file in the place of a device, a pipe or a socket.

    Raises:
        ValueError: the path is one.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ValueError(f"expected a file, a folder or nothing at {target}, found a device, pipe or socket")


def write_json(target: Path, values: Any) -> None:
    """Write values of JSON's types to a file, whole or not at all."""
    with replacing(target) as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def remove(target: Path) -> None:
    """Delete a file or a folder so that a crash on the way leaves nothing that looks like a whole one."""
    aside = target.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-old-{target.name}")
    os.replace(target, aside)
    _remove(aside)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written in a folder."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
