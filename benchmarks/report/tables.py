"""Markdown tables of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from . import goals
from .results import Comparison, Machine, Results, Spread, Way, machines
from .text import duration, figure

SAME = "≈"  # within noise of 1


def report(results: Sequence[Results]) -> str:
    """Format everything: per machine its goals, a summary, and a table for every comparison."""
    found = machines(results)
    parts = [_machine(machine) for machine in found]
    absent = goals.elsewhere(found)
    return "\n".join([*parts, absent, ""] if absent else parts)


def _machine(machine: Machine) -> str:
    lines = [f"# {machine.title}", "", _circumstances(machine), "", goals.table(machine), ""]
    group = None
    for comparison in machine.comparisons:
        if comparison.group != group:
            group = comparison.group
            lines += [f"## {group}", ""]
        lines += [table(comparison, _of_run(machine, comparison)), ""]
    return "\n".join(lines)


def _circumstances(machine: Machine) -> str:
    """Format the runs, which a number tells apart if there are several."""
    several = len(machine.runs) > 1
    runs = [
        f"Run {number}: {_circumstances_of(run)}\n" if several else _circumstances_of(run)
        for number, run in enumerate(machine.runs, 1)
    ]
    return "\n".join(
        [
            *runs,
            "Times are medians of interleaved rounds with 20 and 80 % quantiles, ratios are formed within a "
            f"round; {SAME} marks a ratio that is within noise of 1: it differs from 1 by no more than timing the "
            "yardstick twice does, or 1 is between its quantiles.",
        ]
    )


def _circumstances_of(run: Results) -> str:
    environment, settings = run.environment, run.settings
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    absent = [name for name, version in environment["versions"].items() if version is None]
    missing = f" Not installed: {', '.join(absent)}." if absent else ""
    load = " The machine was busy with other work when the run began." if run.busy else ""
    scale = f", scale {settings['scale']}" if "scale" in settings else ""
    return (
        f"Commit {(run.commit or 'unknown')[:10]}, {environment['date'][:10]}{scale}, "
        f"Python {environment['python']}, {versions}.{missing}{load}"
    )


def _of_run(machine: Machine, comparison: Comparison) -> str:
    if len(machine.runs) == 1:
        return ""
    return f" Run {machine.runs.index(machine.run_of(comparison)) + 1}."


def table(comparison: Comparison, run: str = "") -> str:
    """Format a comparison, the yardstick first; `run` is a sentence on where it comes from."""
    yardstick = comparison.yardstick.name
    lines = [
        f"### {comparison.case}",
        "",
        f"| | way | time / {yardstick} | 20 to 80 % | time | runs | peak memory | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(comparison, way) for way in comparison.ways]
    lines += [f"| | {name} | {reason} | | | | | |" for name, reason in comparison.left_out.items()]
    lines += ["", f"{comparison.rounds} rounds; noise {comparison.noise:.1%}: {_repeat(comparison)}{run}"]
    for way in comparison.ways:
        if way.notes.get("steps"):
            lines.append(f"{way.name}: {', '.join(map(str, way.notes['steps']))} steps.")
        lines += [f"{way.name}: {note}." for key in ("scaled", "faults") for note in way.notes.get(key, ())]
    return "\n".join(lines)


def _repeat(comparison: Comparison) -> str:
    repeat = comparison.repeat
    return f"{comparison.yardstick.name} over itself {repeat.low:.3f} to {repeat.high:.3f}."


def _row(comparison: Comparison, way: Way) -> str:
    if way is comparison.yardstick:
        ratio, spread = "1", ""
    else:
        found = comparison.ratio(way)
        ratio, spread = ratio_text(comparison, found), f"{figure(found.low)} to {figure(found.high)}"
    memory = "" if way.memory is None else f"{way.memory / 2**20:,.0f} MiB"
    error = "" if way.error is None else f"{way.error:.0e}"
    cells = [
        way.role,
        way.name,
        ratio,
        spread,
        duration(way.time.median),
        str(len(way.seconds)),
        memory,
        error,
    ]
    return f"| {' | '.join(cells)} |"


def ratio_text(comparison: Comparison, ratio: Spread, digits: int = 3) -> str:
    """Format a ratio: marked where it is within noise of 1, else with as many digits as let it not read as 1."""
    if not comparison.differs(ratio):
        return f"{figure(ratio.median, digits)} {SAME}"
    texts = [(figure(ratio.median, more), figure(1.0, more)) for more in range(digits, 7)]
    return next((found for found, one in texts if found != one), texts[0][0])
