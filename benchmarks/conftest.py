"""pytest-benchmark runs the suite and keeps what it finds; the rounds themselves are `harness.compare`'s.

pytest-benchmark times one test after the other, where ways of doing the same work should take turns. So a case is
measured as a whole when the first of its ways asks for it; every way's test then hands its times to
pytest-benchmark, whose timer replays them. The JSON that it writes is the suite's format, that of
`benchmarks.report.results`.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import commit, environment
from benchmarks.report.results import FORMAT, Comparison, Results
from benchmarks.suite import SCALES, Benchmark, Options, benchmarks, measure
from diffmtl_fast._files import replacing

RESULTS = Path(__file__).parent / "results"  # of whole runs only
PARTS = Path(__file__).parents[1] / "runs" / "bench"


@dataclass
class Session:
    """What a run was asked for and what it found.

    Attributes:
        options: what was asked for.
        environment: of `harness.environment`.
        commit: of `harness.commit`.
        path: the JSON file; None if nothing is stored.
        stored: where a whole run's file goes in the end, in place of `path`.
        found: every case that was measured, or what went wrong.
    """

    options: Options
    environment: Mapping[str, Any]
    commit: Mapping[str, Any]
    path: Path | None
    stored: Path | None = None
    found: dict[tuple[str, str], Comparison | Exception] = field(default_factory=dict)

    def comparison(self, benchmark: Benchmark) -> Comparison:
        """Measure a case, or return what was measured.

        Raises:
            Exception: what went wrong, once for each way.
        """
        key = (benchmark.group, benchmark.case)
        if key not in self.found:
            try:
                self.found[key] = measure(benchmark, self.options)
            except Exception as failure:
                self.found[key] = failure
        found = self.found[key]
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def left_out(self) -> list[dict[str, str]]:
        """The ways without figures, and why."""
        return [
            {"group": found.group, "case": found.case, "way": way, "reason": reason}
            for found in self.found.values()
            if isinstance(found, Comparison)
            for way, reason in found.left_out.items()
        ]


SESSION = pytest.StashKey[Session]()


class Replay:
    """A timer that makes pytest-benchmark's rounds last as long as those that were measured."""

    __name__ = "replay"

    def __init__(self) -> None:
        self._ticks: Iterator[float] = iter(())

    def load(self, seconds: tuple[float, ...]) -> None:
        """Show these times next."""
        self._ticks = (tick for duration in seconds for tick in (0.0, duration))

    def __call__(self) -> float:
        return next(self._ticks)


REPLAY = Replay()


@pytest.fixture
def replay() -> Replay:
    """The timer of every benchmark here."""
    return REPLAY


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[Benchmark], Comparison]:
    """Measure a case, once in a session."""
    return request.config.stash[SESSION].comparison


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("diffmtl-fast benchmarks")
    group.addoption("--device", help="cpu or cuda; default cuda where there is one")
    group.addoption("--scale", choices=SCALES, default="default", help="how much is measured")
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


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    get = config.getoption
    models = get("--models")
    options = Options(
        device=get("--device") or ("cuda" if torch.cuda.is_available() else "cpu"),
        scale=get("--scale"),
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
    everything = sum(len(work.names) for work in benchmarks(usual))
    return options == usual and session.testscollected == everything and session.exitstatus == 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" not in metafunc.fixturenames:
        return
    metafunc.parametrize(
        ("work", "way"),
        [
            pytest.param(
                work,
                way,
                id=f"{work.case} | {way}",
                marks=pytest.mark.benchmark(group=work.group, timer=REPLAY),
            )
            for work in benchmarks(metafunc.config.stash[SESSION].options)
            for way in work.names
        ],
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let -k choose by group too."""
    item.extra_keyword_matches.update(str(mark.kwargs["group"]) for mark in item.iter_markers("benchmark"))


# ---- What pytest-benchmark writes ---------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return dict(config.stash[SESSION].environment)  # its own has the name of the host


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return dict(config.stash[SESSION].commit)  # its own has the path of the checkout


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    session = config.stash[SESSION]
    settings = asdict(session.options)
    settings["reference_repo"] = session.options.reference_repo is not None  # not where it is
    output_json |= {"format": FORMAT, "settings": settings, "left_out": session.left_out}
    for found in output_json["benchmarks"]:
        del found["params"], found["options"]


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
    """End with the tables, and nothing for a case that failed."""
    from benchmarks.report.tables import report

    session = config.stash[SESSION]
    found = tuple(c for c in session.found.values() if isinstance(c, Comparison))
    if found:
        results = Results(session.environment, session.commit["id"], asdict(session.options), found)
        terminalreporter.write("\n" + report([results]))
        if session.path is not None and session.path.exists():
            terminalreporter.write_line(f"\nThese figures are in {session.path}.")
