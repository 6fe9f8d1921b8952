"""What the command line reports in one line, as opposed to a defect of the program, which keeps its traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from ._number_types import IN_WORDS

Errors: TypeAlias = "tuple[type[BaseException], ...]"


class UserError(Exception):
    """The request cannot be carried out as given: a bad option, file, folder or device."""


class TrainingDiverged(RuntimeError):
    """A loss or a weight stopped being a finite number."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has saved a checkpoint."""


# What says what it is without its name.
_PLAIN_WORDS = (ValueError, TypeError, NotImplementedError, ImportError, OSError)


@contextmanager
def blame(key: str, errors: Errors = (Exception, SystemExit)) -> Iterator[None]:
    """Turn what is raised while a user's value or code is put to use into a :class:`UserError`.

    `SystemExit` too: a component that leaves the program must not look like its success.

    Args:
        key: the option that it came from, for example ``"model"``; it begins the message.
        errors: the exception types that are the user's to put right.
    """
    try:
        yield
    except (UserError, TrainingDiverged):
        raise
    except errors as error:
        message = str(error)
        if not isinstance(error, _PLAIN_WORDS):
            message = f"{type(error).__name__}: {message}" if message else type(error).__name__
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
        r"Literal\[(.*?)\]|(?:\w+\.)*((?:list|Sequence)\[)?(?:\w+\.)*([A-Za-z]+)(?:'>|[],]|$)",
        kinds[kinds.lastindex or 0],
    )
    words = []
    for choices, several, kind in named:
        word = choices or {**IN_WORDS, "NoneType": "null"}.get(kind, kind)
        words.append(f"[{word}, …]" if several else word)
    one_of = "one of " if len(words) == 1 and "," in words[0] else ""
    return f"{option[1]}: expected {one_of}{' or '.join(words)}, found {found[1].strip(chr(39))}"
