"""What the command line reports in one line, as opposed to a defect of the program, which keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

Errors: TypeAlias = "tuple[type[Exception], ...]"


class UserError(Exception):
    """The request cannot be carried out as given: a bad option, file, folder or device."""


class TrainingDiverged(RuntimeError):
    """A loss or a weight stopped being a finite number."""


@contextmanager
def blame(key: str, errors: Errors = (ValueError, TypeError, NotImplementedError)) -> Iterator[None]:
    """Turn the given errors, raised while a user's value is put to use, into a :class:`UserError`.

    Args:
        key: the option that the value came from, for example ``"model"``; it begins the message.
        errors: the exception types that a bad value raises.
    """
    try:
        yield
    except errors as error:
        message = str(error)
        raise UserError(message if message.startswith(f"{key}:") else f"{key}: {message}") from error
