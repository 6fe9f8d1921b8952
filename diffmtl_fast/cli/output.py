"""What commands write and print."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .._errors import UserError
from .._files import refuse_special, replacing


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


def columns(rows: Sequence[Sequence[str]], *, named: bool = False) -> str:
    """Lines of text whose cells end under each other; names of rows, if the first cells are such, begin so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if named:
        aligned = [[row[0].ljust(widths[0]), *cells[1:]] for row, cells in zip(rows, aligned, strict=True)]
    return "\n".join(map("  ".join, aligned))
