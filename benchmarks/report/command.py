"""The command line of the reports: tables and pictures of runs, and what changed between two of them.

What the user can put right is reported as one line on standard error, with exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import compare
from benchmarks.report.plots import captions, draw
from benchmarks.report.readme import rewrite
from benchmarks.report.results import Results, machines
from benchmarks.report.tables import report
from diffmtl_fast._files import replacing

REGRESSED, USAGE = 1, 2


class InputError(ValueError):
    """A file or an option that the user gave cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 1 if `compare` found a regression, 2 if what was given cannot be used.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE


def _parser() -> argparse.ArgumentParser:
    about = "Read the JSON files that the benchmark suite (`make bench`) writes."
    parser = argparse.ArgumentParser("python -m benchmarks", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="report | compare")

    about = (
        "Print what runs measured as Markdown tables. Files of one machine are put together, the latest run of a "
        "case counts. With --out, write them to report.md in a folder, with plots of ratios, growth and roofline; "
        "with --readme, rewrite the marked sections of Markdown files."
    )
    command = commands.add_parser("report", help="tables and plots of any number of runs", description=about)
    command.add_argument("files", nargs="+", type=Path, help="JSON files of runs")
    command.add_argument(
        "--out", type=Path, help="folder for report.md and for every machine's folder of plots"
    )
    command.add_argument("--readme", nargs="+", type=Path, default=[], help="Markdown files to rewrite")
    command.set_defaults(run=_report)

    about = (
        "Compare two runs on one machine, by ratios to the yardstick of the same round and by peak memory. Exit "
        "status 1 if one grew by more than between runs of the same code, or if something is no longer measured. "
        "What cannot be compared, and settings and versions that differ, are named."
    )
    command = commands.add_parser(
        "compare", help="what became slower; exit status 1 if anything did", description=about
    )
    command.add_argument("before", type=Path, help="JSON file of the earlier run")
    command.add_argument("after", type=Path, help="JSON file of the later run")
    command.set_defaults(run=_compare)
    return parser


def _report(options: argparse.Namespace) -> int:
    results = [_read("files", path) for path in options.files]
    found = machines(results)
    text = report(results)
    if options.out is None and not options.readme:
        print(text)
    if options.out is not None:
        for machine in found:
            folder = options.out / machine.name
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"out: cannot write {folder} ({error.strerror})") from error
            for path in draw(machine, folder):
                print(f"wrote {path}")
        _write("out", options.out / "report.md", text)
    for readme in options.readme:
        names = [machine.name for machine in found]
        pictures = captions(options.out, names, readme.parent) if options.out else {}
        try:
            rewritten = rewrite(readme.read_text(encoding="utf-8"), results, pictures)
        except (ValueError, OSError) as error:
            raise InputError(f"readme: {readme}: {error}") from error
        _write("readme", readme, rewritten)
    return 0


def _compare(options: argparse.Namespace) -> int:
    before, after = _read("before", options.before), _read("after", options.after)
    try:
        found = compare.changes(before, after)
    except ValueError as error:
        raise InputError(f"after: {error}") from error
    print(compare.table(found))
    return REGRESSED if found.regressed else 0


def _read(name: str, path: Path) -> Results:
    try:
        return Results.read(path)
    except OSError as error:
        raise InputError(f"{name}: expected a file, found none at {path} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _write(name: str, path: Path, text: str) -> None:
    """Write a file that the user named, all of it or nothing."""
    try:
        with replacing(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{name}: cannot write {path} ({error.strerror})") from error
    print(f"wrote {path}")
