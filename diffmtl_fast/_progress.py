"""Progress on the terminal: a live bar, or plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from ._extras import require

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What a long piece of work tells the user."""

    def update(self, done: int, text: str | None = None) -> None:
        """Report how much is done, with the latest news if there is any."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_progress(total: int, start: int = 0, *, unit: str = "it") -> Progress:
    """A progress report on standard output.

    Args:
        total: the units of work.
        start: those done before.
        unit: their name.
    """
    return BarProgress(total, start) if sys.stdout.isatty() else LineProgress(total, start, unit)


class NoProgress:
    """Silence."""

    def update(self, done: int, text: str | None = None) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Do nothing."""


class BarProgress:
    """A rich progress bar with the latest news beside it."""

    def __init__(self, total: int, start: int) -> None:
        rich = require("rich.progress", "train")
        self._bar = rich.Progress(
            rich.TextColumn("{task.completed:>{task.fields[width]}}/{task.total}"),
            rich.BarColumn(bar_width=24),
            rich.TimeRemainingColumn(compact=True),
            rich.TextColumn("{task.fields[news]}"),
        )
        self._task = self._bar.add_task("", total=total, completed=start, width=len(str(total)), news="")
        self._bar.start()

    def update(self, done: int, text: str | None = None) -> None:
        """Move the bar."""
        fields = {} if text is None else {"news": text}
        self._bar.update(self._task, completed=done, **fields)

    def close(self) -> None:
        """Stop drawing; the last state stays."""
        self._bar.stop()


class LineProgress:
    """A plain line every ten seconds, and a last one; of the updates that bring news."""

    def __init__(self, total: int, start: int, unit: str) -> None:
        self._total = total
        self._start = start
        self._unit = unit
        self._begun = time.monotonic()
        self._printed = self._begun
        self._last: tuple[int, str] | None = None

    def update(self, done: int, text: str | None = None) -> None:
        """Print the line if it is time."""
        if text is None:
            return
        self._last = (done, text)
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def close(self) -> None:
        """Print the last line."""
        self._print()

    def _print(self) -> None:
        if self._last is None:
            return
        done, text = self._last
        self._last = None
        self._printed = time.monotonic()
        rate = (done - self._start) / max(self._printed - self._begun, 1e-9)
        print(f"{done:>{len(str(self._total))}}/{self._total}  {rate:.2f} {self._unit}/s  {text}", flush=True)
