"""The suite as a whole: every capability, every goal, what a run stores, what a failure leaves."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import measure as measuring
from benchmarks import memory
from benchmarks.benchmark import SCALES, Benchmark, Options, Scale
from benchmarks.harness import Candidate
from benchmarks.measure import measure
from benchmarks.memory import LeftOut, peak_of
from benchmarks.names import Group
from benchmarks.report import Results
from benchmarks.report.goals import GOALS, Goal
from benchmarks.suite import GROUPS, benchmarks
from diffmtl_fast.weighting import METHODS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_capability_has_every_role(scale: Scale, device: str) -> None:
    roles: dict[str, set[str]] = {}
    keys = []
    for work in benchmarks(Options(device, scale)):
        roles.setdefault(work.group, set()).update(work.ways.values())
        keys.append((work.group, work.case))
        assert next(iter(work.ways.values())) in ("limit", "reference")
        assert "ours" in work.ways.values()
        assert not work.ways.keys() & work.absent.keys()
    compiled = scale == "full" or (device, scale) == ("cuda", "default")
    absent = {Group.COMPILED} if not compiled else set()
    if device == "cuda":  # two processes need two of them
        absent |= {Group.DISTRIBUTED}
    assert list(roles) == [group for group in Group if group not in absent]
    assert len(set(keys)) == len(keys)
    for group, found in roles.items():
        # The compiled step is compared with compilers and with ours alone.
        assert found >= {"limit", "ours"} | (set() if group == Group.COMPILED else {"reference"}), group
        assert "baseline" in found or (group, scale) == (Group.OPS, "quick"), group


def test_a_run_can_be_of_some_groups() -> None:
    found = [(b.group, b.case) for b in benchmarks(Options(groups=("step", "weights")))]
    everything = [(b.group, b.case) for b in benchmarks(Options())]
    assert found == [key for key in everything if key[0] in (Group.WEIGHTS, Group.STEP)]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.title}, {goal.measure}, {goal.device}")
def test_every_goal_is_measured(goal: Goal) -> None:
    device = goal.device or "cpu"
    works = (b for scale in ("default", "full") for b in benchmarks(Options(device, scale)))
    found = [b for b in works if goal.concerns(b.group, b.parameters, device)]
    there = [b for b in found if set(goal.ways) & b.ways.keys()]
    assert there
    for work in there:
        assert goal.over is None or goal.over in work.ways
        assert goal.measure != "share" or {"bytes", "limit_bytes"} <= work.parameters.keys()
        assert goal.measure != "gib" or work.memory


def test_stored_results_have_the_names_of_the_suite() -> None:
    """A renamed group or way would leave what is stored of it unread: its goals would seem not measured."""
    known: dict[str, set[str]] = {}
    for device, scale in itertools.product(("cpu", "cuda"), SCALES):
        for work in benchmarks(Options(device, scale)):
            known.setdefault(work.group, set()).update(work.ways)
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        for found in Results.read(path).comparisons:
            assert found.group in known, path.name
            assert {way.name for way in found.ways} <= known[found.group], (path.name, found.case)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_memory_is_measured_of_can_be_sent_to_another_process(device: str) -> None:
    found = [b for scale in SCALES for b in benchmarks(Options(device, scale)) if b.memory]
    assert {b.group for b in found} > {Group.CLUSTERING, Group.WEIGHTS, Group.STEP}
    for work in found:
        assert pickle.loads(pickle.dumps(work.build)).func is work.build.func  # type: ignore[attr-defined]


def test_every_group_is_there() -> None:
    assert list(GROUPS) == list(Group)


@pytest.mark.parametrize(
    "group",
    [g for g in Group if g not in (Group.OPS, Group.AFFINITY, Group.COMPILED, Group.DISTRIBUTED)],  # no peers
    ids=lambda g: g.key,
)
def test_installed_peers_are_measured(group: Group) -> None:
    """Nobody is left out by a fault of ours: of the peers that are installed, all have figures in a quick run."""
    for name in ("torchjd", "kmeans1d", "ruptures"):
        pytest.importorskip(name)
    options = Options("cpu", "quick", (group.key,), compile=False, memory=False, rounds=1)
    first = {}
    for work in benchmarks(options):
        first |= {w: work for w, role in work.ways.items() if role == "peer" and w not in first}
    assert first
    for work in {work.case: work for work in first.values()}.values():
        found = measure(work, options)
        peers = {name for name, role in work.ways.items() if role == "peer"}
        assert peers <= {way.name for way in found.ways}, found.left_out


def made_up(build: Callable[[], list[Candidate]], **changes: object) -> Benchmark:
    work = Benchmark(Group.STEP, "case", {"limit": "limit", "ours": "ours"}, build, 2, warmup=0)
    return replace(work, **changes)  # type: ignore[arg-type]


def test_names_are_those_that_were_said() -> None:
    with pytest.raises(ValueError, match=r"full training step: case: expected ways .*, found {'limit'}"):
        made_up(lambda: [Candidate("limit", lambda: None)]).candidates()
    order = made_up(lambda: [Candidate("ours", lambda: None), Candidate("limit", lambda: None)]).candidates()
    assert [candidate.name for candidate in order] == ["limit", "ours"]


def test_memory_is_each_ways_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise MemoryError

    work = made_up(
        lambda: [
            Candidate("limit", lambda: None),
            Candidate("ours", lambda: None),
            Candidate("peer", broken, broken, peer=True),  # type: ignore[arg-type]
        ],
        ways={"limit": "limit", "ours": "ours", "peer": "peer"},
        absent={"another": "not installed"},
        memory=True,
    )
    monkeypatch.setattr(measuring, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(memory, "peak", lambda run, device: run() or 100)
    found = measure(work, Options())
    assert [way.memory for way in found.ways] == [100, 100]
    assert found.left_out == {"peer": "MemoryError: ", "another": "not installed"}
    with pytest.raises(LeftOut, match="MemoryError"):
        peak_of(work.build, "peer", torch.device("cpu"))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the suite as `make bench` does, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_suite.py", "-q", "-p", "no:cacheprovider"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [*command, "--device", "cpu", "--scale", "quick", *arguments],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_stores_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("ecos")
    done = run("--groups", "weights", "--rounds", "3", "--results", str(tmp_path), "--machine", "here")
    assert done.returncode == 0, done.stdout + done.stderr
    found = Results.read(tmp_path / "here.json")
    assert {(c.group, c.rounds) for c in found.comparisons} == {(Group.WEIGHTS, 3)}
    measured = {c.parameters.get("method") for c in found.comparisons}
    assert {m.cls.__name__ for m in METHODS.values() if m.forms_gramian} - {"NashMTL"} <= measured
    mgda = next(c for c in found.comparisons if c.parameters.get("method") == "MGDA")
    assert mgda["TorchJD"].error is not None
    assert mgda["diffmtl_fast"].error < 1e-4
    nash = next(c for c in found.comparisons if c.parameters["op"] == "Nash weights")
    assert {"diffmtl_fast", "cvxpy + ECOS, as published", "cvxpy + ECOS, compiled once"} < {
        way.name for way in nash.ways
    }
    assert nash["diffmtl_fast"].error is not None
    assert nash["diffmtl_fast"].error < 1e-4
    assert nash.left_out["LibMTL"] == "the published solver"
    # The statistics of every way are of these times, those of the rounds pytest-benchmark's own.
    record = json.loads((tmp_path / "here.json").read_text())
    for entry in record["benchmarks"]:
        assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == len(entry["extra_info"]["turns"])
        assert entry["stats"]["median"] == pytest.approx(
            torch.tensor(entry["stats"]["data"]).quantile(0.5).item()
        )
    assert str(ROOT) not in (tmp_path / "here.json").read_text()
    assert os.uname().nodename not in json.dumps(record["machine_info"])
    assert "### Nash weights, K = 5" in done.stdout
    assert "| Nash weights / cvxpy + ECOS, as published | Nash weights, K = 5 | ≤ 1/200" in done.stdout


def test_a_wrong_result_fails_the_run_and_is_not_stored(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import diffmtl_fast.clustering as c\n"
        "find = c.cluster_intervals\n"
        "def worse(cost, T, k, **more):\n"
        "    return find(cost, T, k if 'solver' in more else max(1, k - 1), **more)\n"
        "c.cluster_intervals = worse\n"
    )
    done = run("-k", "400", "--results", str(tmp_path), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "GateError: diffmtl_fast: expected a relative error <= 1e-09, found" in done.stdout
    assert not list(tmp_path.glob("*.json"))
