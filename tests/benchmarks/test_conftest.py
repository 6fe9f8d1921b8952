"""Where a run's file goes, and what it is called after."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import conftest
from benchmarks.benchmark import Options
from benchmarks.conftest import SESSION, Session, machine
from benchmarks.suite import benchmarks

EVERYTHING = len(list(benchmarks(Options())))


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("AMD EPYC", "amd_epyc"),
        ("AMD EPYC 7763 64-Core Processor", "amd_epyc_7763"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", "intel_xeon_platinum_8375c"),
        ("12th Gen Intel(R) Core(TM) i7-1260P", "12th_gen_intel_core_i7_1260p"),
        ("AMD Ryzen 7 7840U w/ Radeon 780M Graphics", "amd_ryzen_7_7840u_w_radeon_780m_graphics"),
        ("AMD Ryzen 5 3500U with Radeon Vega Mobile Gfx", "amd_ryzen_5_3500u"),
        ("", "aarch64"),
    ],
)
def test_a_machine_is_called_after_its_processor(cpu: str, name: str) -> None:
    found = {"gpu": None, "cpu": cpu, "machine": "aarch64", "threads": 2}
    assert machine(found) == f"cpu_{name}_2_threads"
    assert machine(found | {"gpu": "NVIDIA H200"}) == "nvidia_h200"


def finish(folder: Path, options: Options, collected: int = EVERYTHING, status: int = 0) -> Path | None:
    """End a run as pytest does; return where its file is then."""
    (folder / "parts").mkdir(parents=True)
    path = folder / "parts" / "machine.json"
    path.write_text(json.dumps({"format": 1, "benchmarks": [{"name": "new"}]}))
    run = Session(options, {}, {}, path, folder / "results" / "machine.json")
    session: Any = SimpleNamespace(
        testscollected=collected, exitstatus=status, config=SimpleNamespace(stash={SESSION: run})
    )
    wrapper = conftest.pytest_sessionfinish(session)
    next(wrapper)
    with pytest.raises(StopIteration):
        next(wrapper)
    return run.path


def test_a_whole_run_replaces_the_stored_results(tmp_path: Path) -> None:
    for scale in ("default", "full"):
        options = Options(scale=scale)  # type: ignore[arg-type]
        everything = len(list(benchmarks(options)))
        assert finish(tmp_path / scale, options, everything) == tmp_path / scale / "results" / "machine.json"
        assert not (tmp_path / scale / "parts" / "machine.json").exists()
        assert "new" in (tmp_path / scale / "results" / "machine.json").read_text()


@pytest.mark.parametrize(
    ("options", "collected", "status"),
    [
        (Options(), EVERYTHING - 1, 0),
        (Options(), EVERYTHING, 1),
        (Options(), EVERYTHING, 2),
        (Options(rounds=3), EVERYTHING, 0),
        (Options(batch=40), EVERYTHING, 0),
        (Options(groups=("step",)), EVERYTHING, 0),
        (Options(models=("dit", "unet", "diffusers-dit")), EVERYTHING, 0),
        (Options(memory=False), EVERYTHING, 0),
        (Options(compile=False), EVERYTHING, 0),
        (Options(reference_repo="theirs"), EVERYTHING, 0),
    ],
    ids=[
        "-k",
        "failed",
        "interrupted",
        "rounds",
        "batch",
        "groups",
        "models",
        "memory",
        "compile",
        "reference",
    ],
)
def test_a_part_leaves_the_stored_results_alone(
    tmp_path: Path, options: Options, collected: int, status: int
) -> None:
    (tmp_path / "results").mkdir()
    stored = tmp_path / "results" / "machine.json"
    stored.write_text("old")
    assert finish(tmp_path, options, collected, status) == tmp_path / "parts" / "machine.json"
    assert stored.read_text() == "old"
    assert "new" in (tmp_path / "parts" / "machine.json").read_text()


def test_groups_are_named_by_their_keys() -> None:
    assert conftest.groups("step,weights") == ("step", "weights")
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"expected some of clustering, ops, .*, found steps"
    ):
        conftest.groups("step,steps")
