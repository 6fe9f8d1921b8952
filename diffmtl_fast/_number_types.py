"""Numbers in a range, for options: jsonargparse checks them, type checkers see plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    UnitFloat: TypeAlias = float
else:
    from ._extras import require

    _types = require("jsonargparse.typing", "train")
    PositiveInt, NonNegativeInt = _types.PositiveInt, _types.NonNegativeInt
    PositiveFloat, NonNegativeFloat = _types.PositiveFloat, _types.NonNegativeFloat
    UnitFloat = _types.ClosedUnitInterval

#: The types in words, for messages.
IN_WORDS = {
    "PositiveInt": "an integer >= 1",
    "NonNegativeInt": "an integer >= 0",
    "PositiveFloat": "a number > 0",
    "NonNegativeFloat": "a number >= 0",
    "ClosedUnitInterval": "a number >= 0 and <= 1",
}
