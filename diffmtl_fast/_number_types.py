"""Numbers in a range, for options: jsonargparse checks them, type checkers see plain numbers.

The upper ends are far beyond what anyone uses: they keep a slip of the keyboard from being taken at its word.
"""

from __future__ import annotations

import functools
import operator
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args, get_origin

if TYPE_CHECKING:
    Integer: TypeAlias = int
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    Size: TypeAlias = int
    SizeOrZero: TypeAlias = int
    Seed: TypeAlias = int
    Processes: TypeAlias = int
    Workers: TypeAlias = int
    Number: TypeAlias = float
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    UnitFloat: TypeAlias = float
else:
    from ._extras import require

    def _between(name: str, base: type, least: str, low: float, high: float) -> type:
        make = require("jsonargparse.typing", "train").restricted_number_type
        return make(name, base, [(least, low), ("<=", high)])

    Integer = _between("AnyInteger", int, ">=", -(10**9), 10**9)
    PositiveInt = _between("CountFromOne", int, ">=", 1, 10**9)
    NonNegativeInt = _between("CountFromZero", int, ">=", 0, 10**9)
    Size = _between("SizeInMemory", int, ">=", 1, 10**6)
    SizeOrZero = _between("SizeFromZero", int, ">=", 0, 10**6)
    Seed = _between("SeedOfTorch", int, ">=", 0, 2**63 - 1)
    Processes = _between("CountOfProcesses", int, ">=", 1, 1024)
    Workers = _between("CountOfWorkers", int, ">=", 0, 1024)
    Number = _between("AnyNumber", float, ">=", -1e30, 1e30)
    PositiveFloat = _between("FloatAboveZero", float, ">", 0, 1e30)
    NonNegativeFloat = _between("FloatFromZero", float, ">=", 0, 1e30)
    UnitFloat = require("jsonargparse.typing", "train").ClosedUnitInterval

#: The types in words, for messages.
IN_WORDS = {
    "AnyInteger": "an integer >= -10^9 and <= 10^9",
    "CountFromOne": "an integer >= 1 and <= 10^9",
    "CountFromZero": "an integer >= 0 and <= 10^9",
    "SizeInMemory": "an integer >= 1 and <= 10^6",
    "SizeFromZero": "an integer >= 0 and <= 10^6",
    "SeedOfTorch": "an integer >= 0 and < 2^63",
    "CountOfProcesses": "an integer >= 1 and <= 1024",
    "CountOfWorkers": "an integer >= 0 and <= 1024",
    "AnyNumber": "a number >= -10^30 and <= 10^30",
    "FloatAboveZero": "a number > 0 and <= 10^30",
    "FloatFromZero": "a number >= 0 and <= 10^30",
    "ClosedUnitInterval": "a number >= 0 and <= 1",
}


def bounded(annotation: Any) -> Any:
    """An annotation with `Integer` and `Number` for plain numbers: of classes that have ranges of their own."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is None or origin is Literal:
        return {int: Integer, float: Number}.get(annotation, annotation)
    inner = [bounded(part) for part in parts]
    return functools.reduce(operator.or_, inner) if origin in (Union, UnionType) else origin[tuple(inner)]


def plain(value: Any) -> Any:
    """Plain numbers, also within lists and dictionaries, in the place of those of a type with a range.

    YAML cannot write the others.
    """
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value.real if isinstance(value, int | float) and not isinstance(value, bool) else value
