"""Ratios and times as they are read."""

from __future__ import annotations


def figure(value: float, digits: int = 3) -> str:
    """Format a ratio, to three digits by default."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value >= 100 or value < 0.1 else f"{value:.{digits - 1}f}"


def duration(seconds: float, digits: int = 3) -> str:
    """Format a time, to three digits by default."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.{digits}g} {unit}"
    return f"{seconds * 1e9:.{digits}g} ns"


def fraction(value: float, digits: int = 3) -> str:
    """Format a small ratio as one over its inverse: 0.125 is 1/8."""
    inverse = 1.0 / value
    return f"1/{inverse:,.0f}" if inverse >= 1000 else f"1/{inverse:.{digits}g}"
