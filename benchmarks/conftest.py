"""How pytest runs the suite, and the JSON file that is left of a run.

pytest-benchmark runs the rounds of every case and times them as a whole; a way's own times are taken within the
rounds, by `harness.compare`. The file has one entry for each way, in pytest-benchmark's format, which
`report.results` reads.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.stats import Stats

from benchmarks.benchmark import SCALES, Benchmark, Options
from benchmarks.harness import Repeat, commit, environment
from benchmarks.measure import measure
from benchmarks.names import Group
from benchmarks.report.results import FORMAT, Comparison, Results, Way, entry
from benchmarks.report.tables import report
from benchmarks.suite import benchmarks
from diffmtl_fast._files import replacing

RESULTS = Path(__file__).parent / "results"  # of whole runs only
GROUP_KEYS = tuple(group.key for group in Group)
PARTS = Path(__file__).parents[1] / "runs" / "bench"
SUITE = Path(__file__).parent / "bench_suite.py"


@dataclass
class Session:
    """What a run was asked for and what it found.

    Attributes:
        options: what was asked for.
        environment: of `harness.environment`.
        commit: of `harness.commit`.
        path: the JSON file; None if nothing is stored.
        stored: where a whole run's file goes in the end, in place of `path`.
        found: every case that was measured.
    """

    options: Options
    environment: Mapping[str, Any]
    commit: Mapping[str, Any]
    path: Path | None
    stored: Path | None = None
    found: list[Comparison] = field(default_factory=list)

    def measure(self, work: Benchmark, repeat: Repeat) -> None:
        """Measure a case."""
        self.found.append(measure(work, self.options, repeat))

    @property
    def left_out(self) -> list[dict[str, str]]:
        """The ways without figures, and why."""
        return [
            {"group": found.group, "case": found.case, "way": way, "reason": reason}
            for found in self.found
            for way, reason in found.left_out.items()
        ]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What the JSON file has of every way."""
        return [_entry(found, way) for found in self.found for way in found.ways]


def _entry(comparison: Comparison, way: Way) -> dict[str, Any]:
    statistics = Stats()
    for seconds in way.seconds:
        statistics.update(seconds)
    name = f"{comparison.case} | {way.name}"
    return {
        "group": comparison.group,
        "name": name,
        "fullname": f"{comparison.group}: {name}",
        "extra_info": entry(comparison, way),
        "stats": statistics.as_dict() | {"data": list(way.seconds)},
    }


SESSION = pytest.StashKey[Session]()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[Benchmark, Repeat], None]:
    """Measure a case and keep what was found."""
    return request.config.stash[SESSION].measure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("diffmtl-fast benchmarks")
    group.addoption("--device", help="cpu or cuda; default cuda where there is one")
    group.addoption("--scale", choices=SCALES, default="default", help="how much is measured")
    group.addoption(
        "--groups", type=groups, help=f"groups to measure, separated by commas: {', '.join(GROUP_KEYS)}"
    )
    group.addoption("--models", help="models of the training step, separated by commas")
    group.addoption("--batch", type=int, help="batch size of the training step")
    group.addoption("--rounds", type=int, help="rounds of every comparison")
    group.addoption("--no-compile", action="store_true", help="without torch.compile's baselines")
    group.addoption("--no-memory", action="store_true", help="without peak memory")
    group.addoption("--reference-repo", help="checkout of the authors' repository, in place of our reference")
    group.addoption(
        "--results",
        type=Path,
        help="folder of the JSON file; default benchmarks/results for a whole run, runs/bench for a part, "
        "none for a quick one",
    )
    group.addoption("--machine", help="name of the JSON file; by default after the device")


def groups(text: str) -> tuple[str, ...]:
    """Read the keys of groups.

    Raises:
        argparse.ArgumentTypeError: one of them is unknown.
    """
    found = tuple(text.split(","))
    unknown = [key for key in found if key not in GROUP_KEYS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(GROUP_KEYS)}, found {', '.join(unknown)}"
        )
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    get = config.getoption
    models = get("--models")
    options = Options(
        device=get("--device") or ("cuda" if torch.cuda.is_available() else "cpu"),
        scale=get("--scale"),
        groups=get("--groups"),
        compile=not get("--no-compile"),
        memory=not get("--no-memory"),
        rounds=get("--rounds"),
        models=tuple(models.split(",")) if models else None,
        batch=get("--batch"),
        reference_repo=get("--reference-repo"),
    )
    # A run that is told to end, by a time limit for example, keeps what it has measured, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measured_in = environment(torch.device(options.device))
    name = f"{get('--machine') or machine(measured_in)}.json"
    folder = get("--results") or (None if options.quick else PARTS)
    path = None if folder is None else folder / name
    stored = RESULTS / name if folder is PARTS else None
    config.stash[SESSION] = Session(options, measured_in, commit(), path, stored)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = str(path)
    config.option.benchmark_sort = "fullname"
    config.option.benchmark_columns = ["median", "iqr", "min", "max", "rounds"]


def machine(measured_in: Mapping[str, Any]) -> str:
    """Return a file name for a machine: its GPU, or its processor's model and how many threads are used."""
    if measured_in["gpu"]:
        return _slug(measured_in["gpu"])
    model = re.sub(r"@.*|\((r|tm|c)\)|\b(cpu|processor|\d+-core|with .*)\b", " ", measured_in["cpu"].lower())
    return _slug(f"cpu {_slug(model) or measured_in['machine']} {measured_in['threads']} threads")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def whole(session: pytest.Session, options: Options) -> bool:
    """Return whether everything of a default or full run was measured as usual, and nothing went wrong."""
    usual = Options(device=options.device, scale=options.scale)
    everything = sum(1 for _ in benchmarks(usual))
    return options == usual and session.testscollected == everything and session.exitstatus == 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "work" not in metafunc.fixturenames:
        return
    works = benchmarks(metafunc.config.stash[SESSION].options)
    marks = pytest.mark.benchmark
    metafunc.parametrize(
        "work", [pytest.param(work, id=work.case, marks=marks(group=work.group)) for work in works]
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let -k choose by group and by way, too, and drop the test that pytest collects where there is no case."""
    for item in list(items):
        work = item.callspec.params.get("work") if hasattr(item, "callspec") else None
        if isinstance(work, Benchmark):
            item.extra_keyword_matches.update([str(work.group), *work.ways, *work.absent])
        elif item.path == SUITE:
            items.remove(item)


# ---- What pytest-benchmark writes ---------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return dict(config.stash[SESSION].environment)  # pytest-benchmark's own has the name of the host


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return dict(config.stash[SESSION].commit)  # pytest-benchmark's own has the path of the checkout


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    session = config.stash[SESSION]
    settings = asdict(session.options)
    settings["reference_repo"] = session.options.reference_repo is not None  # not its path
    output_json |= {"format": FORMAT, "settings": settings, "left_out": session.left_out}
    output_json["benchmarks"] = session.entries  # in place of the rounds of whole cases


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    yield
    measured_in = session.config.stash[SESSION]
    path = measured_in.path
    if path is None or not path.exists() or not path.stat().st_size:
        return
    record = json.loads(path.read_text())
    with replacing(path) as aside:
        aside.write_text(one_line_each(record))
    if measured_in.stored is not None and whole(session, measured_in.options):
        measured_in.stored.parent.mkdir(parents=True, exist_ok=True)
        measured_in.path = path.replace(measured_in.stored)


def one_line_each(record: Mapping[str, Any]) -> str:
    """Format as JSON with one line for every way, so that differences of two versions can be read."""
    head = {key: value for key, value in record.items() if key != "benchmarks"}
    text = json.dumps(head, indent=1, ensure_ascii=False)
    lines = ",\n".join("  " + json.dumps(found, ensure_ascii=False) for found in record["benchmarks"])
    return f'{text[:-2]},\n "benchmarks": [\n{lines}\n ]\n}}\n'


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """End with the tables of the cases that did not fail."""
    session = config.stash[SESSION]
    if session.found:
        settings = asdict(session.options)
        results = Results(session.environment, session.commit["id"], settings, tuple(session.found))
        terminalreporter.write("\n" + report([results]))
        if session.path is not None and session.path.exists():
            terminalreporter.write_line(f"\nThese figures are in {session.path}.")
