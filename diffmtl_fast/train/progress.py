"""Progress on the terminal: a live bar, or plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from .._extras import require

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What the loop tells the user while it runs."""

    def update(self, iteration: int, line: dict[str, Any] | None = None) -> None:
        """Report an iteration, with the latest line of the history if there is a new one."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_progress(total: int, start: int) -> Progress:
    """A progress report on standard output.

    Args:
        total: iterations of the run.
        start: iterations done before.
    """
    return BarProgress(total, start) if sys.stdout.isatty() else LineProgress(total, start)


class BarProgress:
    """A rich progress bar with the loss of every cluster."""

    def __init__(self, total: int, start: int) -> None:
        rich = require("rich.progress", "train")
        self._bar = rich.Progress(
            rich.TextColumn("{task.completed:>{task.fields[width]}}/{task.total}"),
            rich.BarColumn(bar_width=24),
            rich.TimeRemainingColumn(compact=True),
            rich.TextColumn("{task.fields[losses]}"),
        )
        self._task = self._bar.add_task(
            "train", total=total, completed=start, width=len(str(total)), losses=""
        )
        self._bar.start()

    def update(self, iteration: int, line: dict[str, Any] | None = None) -> None:
        """Move the bar."""
        fields = {} if line is None else {"losses": describe(line)}
        self._bar.update(self._task, completed=iteration, **fields)

    def close(self) -> None:
        """Stop drawing; the last state stays."""
        self._bar.stop()


class LineProgress:
    """A plain line every ten seconds, and a last one."""

    def __init__(self, total: int, start: int) -> None:
        self._total = total
        self._start = start
        self._begun = time.monotonic()
        self._printed = self._begun
        self._last: tuple[int, dict[str, Any]] | None = None

    def update(self, iteration: int, line: dict[str, Any] | None = None) -> None:
        """Print the line if it is time."""
        if line is None:
            return
        self._last = (iteration, line)
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def close(self) -> None:
        """Print the last line."""
        self._print()

    def _print(self) -> None:
        if self._last is None:
            return
        iteration, line = self._last
        self._last = None
        self._printed = time.monotonic()
        rate = (iteration - self._start) / (self._printed - self._begun)
        print(
            f"{iteration:>{len(str(self._total))}}/{self._total}  {rate:.2f} it/s  {describe(line)}",
            flush=True,
        )


def describe(line: dict[str, Any]) -> str:
    """The losses of a line of the history, and the phase of a curriculum, in words."""
    losses = " ".join("-" if loss is None else f"{loss:.3f}" for loss in line["losses"])
    phase = f"  phase {line['phase']}" if "phase" in line else ""
    return f"loss {line['loss']:.4f}  clusters {losses}{phase}"
