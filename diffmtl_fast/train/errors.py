"""What the command line reports in one line, as opposed to a defect of the program, which keeps its traceback."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from .._number_types import IN_WORDS

Errors: TypeAlias = "tuple[type[Exception], ...]"


class UserError(Exception):
    """The request cannot be carried out as given: a bad option, file, folder or device."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, and says how to go on."""


class StopSignals:
    """Notes SIGTERM and Ctrl-C instead of obeying them at once; a second one of the same kind is obeyed.

    Attributes:
        received: name of the signal that came; None before.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])


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


def readable(message: str) -> str:
    """Rewrite jsonargparse's message in the form of the others: option, what was expected, what was found."""
    option = re.match(r'Parser key "([^"]+)":\s*', message)
    kinds = re.search(
        r"Subtypes: (.*)$|Not of type (\w+)|Expected a (.*?)(?:\. Got|$)", message, re.MULTILINE
    )
    found = re.search(r"(?:Given|Got) value: (.*)$", message) or re.search(
        r"Not of type \w+: (?:invalid literal.*: )?(.*?)(?: does not conform.*| not an? \w+)?$", message
    )
    if option is None:
        return message
    if kinds is None or found is None:
        return f"{option[1]}: {message[option.end() :]}"
    named = re.findall(
        r"Literal\[(.*?)\]|(?:\w+\.)*([A-Za-z]+(?:\[\w+\])?)(?:'>|[],]|$)", kinds[kinds.lastindex or 0]
    )
    words = [choices or {**IN_WORDS, "NoneType": "null"}.get(kind, kind) for choices, kind in named]
    one_of = "one of " if len(words) == 1 and "," in words[0] else ""
    return f"{option[1]}: expected {one_of}{' or '.join(words)}, found {found[1].strip(chr(39))}"
