"""Tells during a backward which parameters' gradients are complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class Arrivals:
    """Counts the gradients that come to a store for each parameter, and tells when the last one has come.

    Args:
        expected: how many come for a parameter, by position. Of others nothing is told.
        complete: called once with the position of a parameter when as many have come.
    """

    def __init__(self, expected: Mapping[int, int], complete: Callable[[int], None]) -> None:
        self._left, self._complete = dict(expected), complete

    def note(self, position: int) -> None:
        """Count one.

        Raises:
            RuntimeError: more come than were expected; those before may be under way to other processes.
        """
        if position not in self._left:
            return
        self._left[position] -= 1
        if self._left[position] < 0:
            raise RuntimeError(
                f"parameter {position}: expected the last use of a parameter to be known from the forward, found "
                "one more in the backward; checkpoint with use_reentrant=False"
            )
        if self._left[position] == 0:
            self._complete(position)
