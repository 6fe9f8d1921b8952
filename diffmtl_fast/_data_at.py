"""Where the data are in flow matching: at time 0, or at time 1 as in SiT."""

from __future__ import annotations

from typing import Literal, TypeAlias

DataAt: TypeAlias = Literal[0, 1]


def check_data_at(data_at: int) -> None:
    """Refuse anything but 0 and 1."""
    if data_at not in (0, 1):
        raise ValueError(f"data_at: expected 0 or 1, found {data_at!r}")
