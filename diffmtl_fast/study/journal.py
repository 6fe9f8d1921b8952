"""A file of lines that records which commands a study was made by, and when each piece of its work was done."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Journal:
    """What was recorded.

    Attributes:
        commands: that the work was done by, in their order, each once.
        spans: when each piece of work began and ended, in seconds since 1970, by its name.
    """

    commands: list[str] = field(default_factory=list)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        """Seconds in which some of the work was being done: pauses between commands do not count."""
        total, until = 0.0, float("-inf")
        for begun, ended in sorted(self.spans.values()):
            total += max(ended - max(begun, until), 0.0)
            until = max(until, ended)
        return total

    @property
    def work(self) -> float:
        """Seconds of all pieces of work together."""
        return sum(ended - begun for begun, ended in self.spans.values())


def add_command(path: Path, command: str) -> None:
    """Record a command that begins some work."""
    _add(path, {"command": command})


def add_work(path: Path, name: str, begun: float, seconds: float) -> None:
    """Record a piece of work that is done."""
    _add(path, {"work": name, "begun": round(begun, 1), "seconds": round(seconds, 1)})


def read(path: Path) -> Journal:
    """What is recorded, which is nothing where there is no such file."""
    found = Journal()
    if path.exists():
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if "work" in line:
                found.spans[line["work"]] = (line["begun"], line["begun"] + line["seconds"])
            elif line["command"] not in found.commands:
                found.commands.append(line["command"])
    return found


def _add(path: Path, line: dict[str, str | float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
