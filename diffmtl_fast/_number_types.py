"""Numbers in a range, for options: jsonargparse checks them, type checkers see plain numbers.

The upper ends are far beyond what anyone uses: they keep a slip of the keyboard from being taken at its word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    Size: TypeAlias = int
    Seed: TypeAlias = int
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    UnitFloat: TypeAlias = float
else:
    from ._extras import require

    def _between(name: str, base: type, least: str, low: float, high: float) -> type:
        make = require("jsonargparse.typing", "train").restricted_number_type
        return make(name, base, [(least, low), ("<=", high)])

    PositiveInt = _between("CountFromOne", int, ">=", 1, 10**9)
    NonNegativeInt = _between("CountFromZero", int, ">=", 0, 10**9)
    Size = _between("SizeInMemory", int, ">=", 1, 10**6)
    Seed = _between("SeedOfTorch", int, ">=", 0, 2**63 - 1)
    PositiveFloat = _between("FloatAboveZero", float, ">", 0, 1e30)
    NonNegativeFloat = _between("FloatFromZero", float, ">=", 0, 1e30)
    UnitFloat = require("jsonargparse.typing", "train").ClosedUnitInterval

#: The types in words, for messages.
IN_WORDS = {
    "CountFromOne": "an integer >= 1 and <= 10^9",
    "CountFromZero": "an integer >= 0 and <= 10^9",
    "SizeInMemory": "an integer >= 1 and <= 10^6",
    "SeedOfTorch": "an integer >= 0 and < 2^63",
    "FloatAboveZero": "a number > 0 and <= 10^30",
    "FloatFromZero": "a number >= 0 and <= 10^30",
    "ClosedUnitInterval": "a number >= 0 and <= 1",
}
