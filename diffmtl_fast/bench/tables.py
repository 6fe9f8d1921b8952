"""Markdown tables of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .goals import GOALS, Goal, reached
from .results import Comparison, Results, Spread, Way

SAME = "≈"  # not told apart from 1 by the noise


def report(results: Sequence[Results]) -> str:
    """Format everything: per machine its goals, a summary, and a table for every comparison."""
    return "\n".join(_machine(found) for found in results)


def _machine(results: Results) -> str:
    lines = [f"# {results.machine}", "", _circumstances(results), "", goals(results), ""]
    group = None
    for comparison in results.comparisons:
        if comparison.group != group:
            group = comparison.group
            lines += [f"## {group}", ""]
        lines += [table(comparison), ""]
    return "\n".join(lines)


def _circumstances(results: Results) -> str:
    environment = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    absent = [name for name, version in environment["versions"].items() if version is None]
    missing = f" Not installed: {', '.join(absent)}." if absent else ""
    busy = environment["load"] and environment["load"][0] > environment["threads"]
    load = " The machine was busy with other work when the run began." if busy else ""
    commit = (results.commit or "unknown")[:10]
    return (
        f"Commit {commit}, {environment['date'][:10]}, Python {environment['python']}, {versions}.{missing}{load} "
        "Times are medians of interleaved rounds with 20 and 80 % quantiles, ratios are formed within a round; "
        f"{SAME} marks a ratio that differs from 1 by no more than timing the yardstick twice does."
    )


def table(comparison: Comparison) -> str:
    """Format a comparison, the yardstick first."""
    yardstick = comparison.yardstick.name
    lines = [
        f"### {comparison.case}",
        "",
        f"| | way | time / {yardstick} | 20 to 80 % | time | runs | peak memory | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(comparison, way) for way in comparison.ways]
    lines += [f"| | {name} | {reason} | | | | | |" for name, reason in comparison.left_out.items()]
    lines += ["", f"{comparison.rounds} rounds; noise {comparison.noise:.1%}: {_repeat(comparison)}"]
    for way in comparison.ways:
        if way.notes.get("steps"):
            lines.append(f"{way.name}: {', '.join(map(str, way.notes['steps']))} steps.")
        lines += [f"{way.name}: {fault}." for fault in way.notes.get("faults", ())]
    return "\n".join(lines)


def _repeat(comparison: Comparison) -> str:
    repeat = comparison.repeat
    return f"{comparison.yardstick.name} over itself {repeat.low:.3f} to {repeat.high:.3f}."


def _row(comparison: Comparison, way: Way) -> str:
    if way is comparison.yardstick:
        ratio, spread = "1", ""
    else:
        found = comparison.ratio(way)
        ratio, spread = told(comparison, found), f"{figure(found.low)} to {figure(found.high)}"
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


def told(comparison: Comparison, ratio: Spread) -> str:
    """Format a ratio; one within the noise is not called a difference."""
    return figure(ratio.median) + ("" if comparison.differs(ratio) else f" {SAME}")


def figure(value: float) -> str:
    """Format a ratio to three digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 100 or value < 0.1 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Format a time."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def goals(results: Results) -> str:
    """Format what was to be reached and what was."""
    lines = ["| goal | case | bar | stretch | reached | 20 to 80 % |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        for case, found in reached(goal, results):
            lines.append(_goal(goal, case, found))
    return "\n".join(lines) if len(lines) > 2 else "No goal was measured."


def _goal(goal: Goal, case: str, found: Spread) -> str:
    verdict = "" if goal.met(found.median) else " (short)"
    low, high = sorted((found.low, found.high))
    text = value_of(goal)
    return (
        f"| {goal.title} | {case} | {goal.bar_text} | {goal.stretch_text} | {text(found.median)}{verdict} | "
        f"{text(low)} to {text(high)} |"
    )


def value_of(goal: Goal) -> Callable[[float], str]:
    """Return how a goal's values are formatted."""
    return duration if goal.measure == "seconds" else figure
