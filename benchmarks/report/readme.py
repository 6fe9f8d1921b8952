"""The figures of a README: sections between markers, which only this rewrites.

A section begins with ``<!-- figures: NAME -->`` and ends with ``<!-- end of figures -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from types import MappingProxyType

from benchmarks.names import OURS, TYPICAL_K, Group

from . import goals
from .goals import bandwidths, share
from .plots import CAPTIONS
from .results import Comparison, Machine, Results, machines
from .tables import ratio_text
from .text import duration

_SECTION = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def rewrite(text: str, results: Sequence[Results], pictures: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the text with every section's figures as the results have them.

    Args:
        text: Markdown with marked sections.
        results: of any number of machines, of each any number of runs.
        pictures: path, relative to the text, to caption. A section named like a file shows that one, the section
            "pictures" all that have none.

    Raises:
        ValueError: there is no section, or one of an unknown name.
    """
    if not _SECTION.search(text):
        raise ValueError(
            "expected a section `<!-- figures: NAME -->` … `<!-- end of figures -->`, found none"
        )

    def replaced(match: re.Match[str]) -> str:
        name = match[2]
        if name == PICTURES:
            found = _pictures({p: c for p, c in pictures.items() if PurePosixPath(p).stem not in elsewhere})
        elif name in _OWN_PICTURES:
            found = _pictures({p: c for p, c in pictures.items() if PurePosixPath(p).stem == name})
        elif name in SECTIONS:
            found = SECTIONS[name](machines(results))
        else:
            known = ", ".join((*SECTIONS, PICTURES, *_OWN_PICTURES))
            raise ValueError(f"figures: expected one of {known}, found {name}")
        return f"{match[1]}{found}\n{match[3]}"

    elsewhere = {match[2] for match in _SECTION.finditer(text)}
    return _SECTION.sub(replaced, text)


def steps(found: Sequence[Machine]) -> str:
    """Format the time of a training step over the plain step's: a table per machine, a column per model."""
    return "\n\n".join(_steps(machine) for machine in found if _typical(machine)) or _NOTHING


def _typical(machine: Machine) -> list[Comparison]:
    steps = [c for c in machine.comparisons if c.group == Group.STEP and c.parameters["k"] == TYPICAL_K]
    batch = steps[0].parameters["batch"] if steps else None
    return [c for c in steps if c.parameters["batch"] == batch]


def _steps(machine: Machine) -> str:
    chosen = _typical(machine)
    titles = [c.parameters["title"] for c in chosen]
    names = list(dict.fromkeys(way.name for c in chosen for way in c.ways[1:]))
    lines = [
        f"| {machine.title}, time / plain step | " + " | ".join(titles) + " |",
        "|---" * (1 + len(titles)) + "|",
    ]
    for name in names:
        cells = [ratio_text(c, c.ratio(c[name])) + _memory(c, name) if name in c else "–" for c in chosen]
        lines.append(f"| {_code(name)} | " + " | ".join(cells) + " |")
    noises = ", ".join(f"{c.noise:.0%}" for c in chosen)
    seconds = ", ".join(duration(c.yardstick.time.median) for c in chosen)
    lines += [
        "",
        f"A plain step takes {seconds}; noise {noises}. In brackets: peak memory over the plain step's.",
    ]
    return "\n".join(lines)


def _memory(comparison: Comparison, name: str) -> str:
    plain, ours = comparison.yardstick.memory, comparison[name].memory
    return f" ({ours / plain:.2f})" if plain and ours is not None else ""


def _code(name: str) -> str:
    return name.replace(OURS, f"`{OURS}`")


def reached(found: Sequence[Machine]) -> str:
    """Format what was to be reached and what was, on all machines and on those that are missing."""
    if not found:
        return _NOTHING
    parts = [goals.table(machine) for machine in found]
    return "\n\n".join(filter(None, [*parts, goals.elsewhere(found)]))


def origins(found: Sequence[Machine]) -> str:
    """Format where the figures come from."""
    return f"Measured on {'; '.join(map(_origin, found))}." if found else _NOTHING


def _origin(machine: Machine) -> str:
    torch = ", ".join(dict.fromkeys(run.environment["versions"]["torch"] for run in machine.runs))
    runs = "; ".join(dict.fromkeys(run.origin for run in machine.runs))
    return f"{machine.title} (torch {torch}; {runs})"


def _pictures(pictures: Mapping[str, str]) -> str:
    return "\n\n".join(f"![{caption}]({path})" for path, caption in pictures.items()) or _NOTHING


def ops(found: Sequence[Machine]) -> str:
    """Format every op's time beside plain PyTorch's and its speed beside the memory's: a table per machine."""
    return "\n\n".join(_ops(machine) for machine in found if _of_ops(machine)) or _NOTHING


def _of_ops(machine: Machine) -> list[Comparison]:
    return [c for c in machine.comparisons if c.group == Group.OPS and c.parameters.get("bytes")]


def _ops(machine: Machine) -> str:
    chosen = _of_ops(machine)
    dtypes = sorted({c.parameters["dtype"] for c in chosen}, reverse=True)
    columns = ("of the memory's speed (GB/s)", "PyTorch / ours", "torch.compile / ours")
    lines = [
        f"| {machine.title} | " + " | ".join(f"{dtype}: {c}" for dtype in dtypes for c in columns) + " |",
        "|---" * (1 + len(dtypes) * len(columns)) + "|",
    ]
    for op in dict.fromkeys(c.parameters["op"] for c in chosen):
        cells = []
        for dtype in dtypes:
            found = [c for c in chosen if (c.parameters["op"], c.parameters["dtype"]) == (op, dtype)]
            cells += _speeds(found[0]) if found else ["–"] * len(columns)
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _speeds(comparison: Comparison) -> list[str]:
    (ours,) = comparison.of("ours")
    others = (comparison.of(role) for role in ("reference", "baseline"))
    ratios = (ratio_text(comparison, comparison.ratio(way[0], ours), 2) if way else "–" for way in others)
    return [
        f"{ratio_text(comparison, share(comparison, ours.name))} ({bandwidths(comparison, ours.name)})",
        *ratios,
    ]


PICTURES = "pictures"
_OWN_PICTURES = tuple(PurePosixPath(name).stem for name in CAPTIONS)
_NOTHING = "Nothing has been measured yet."
SECTIONS: dict[str, Callable[[Sequence[Machine]], str]] = {
    "steps": steps,
    "ops": ops,
    "goals": reached,
    "machines": origins,
}
