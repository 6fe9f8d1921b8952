"""Settings under the names that training scripts give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

_Value = TypeVar("_Value")


def rename(arguments: Mapping[str, _Value], names: Mapping[str, str]) -> dict[str, _Value]:
    """Give arguments the names that the code has for them.

    Args:
        arguments: as they were typed.
        names: by a published name the one in the code.

    Raises:
        ValueError: two of the arguments are the same.
    """
    renamed = {names.get(name, name): value for name, value in arguments.items()}
    if len(renamed) < len(arguments):
        raise ValueError(f"expected each setting once, found {', '.join(arguments)}")
    return renamed
