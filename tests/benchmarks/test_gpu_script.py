"""The order and the time limits of gpu.sh, with a stand-in for Python that only notes what it is asked to do."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
STAND_IN = f"""#!{sys.executable}
import os, pathlib, sys, time
out, args = pathlib.Path(os.environ["NOTES"]), sys.argv[1:]
with (out / "calls").open("a") as calls:
    print(*args, file=calls)
if "--machine" in args:
    name = args[args.index("--machine") + 1]
    if name == os.environ.get("BREAK"):
        sys.exit(3)
    if name == os.environ.get("HANG"):
        time.sleep(60)
    pathlib.Path(args[args.index("--results") + 1], name + ".json").write_text("{{}}")
if "report" in args:
    pathlib.Path(args[args.index("--out") + 1], "report.md").write_text("the tables\\n")
if os.environ.get("UNREADY") and "torch" in args[1]:
    sys.exit("no GPU")
sys.exit(1 if "import xdist" in args else 0)
"""


def run(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        [str(SCRIPT), str(folder / "out")],
        env=os.environ
        | {"PYTHON": str(python), "NOTES": str(folder), "SANITIZER": "no-sanitizer"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_parts_run_in_order_and_tables_come_last(tmp_path: Path) -> None:
    done, calls = run(tmp_path, MODELS="one two", DEVICE="cpu", BATCH="8", SCALE="quick", TESTS="tests/x")
    assert done.returncode == 0, done.stderr
    (first, *_) = (call for call in calls if call.startswith("-m"))
    assert "install --no-build-isolation --no-deps -e ." in first
    assert sum(call.endswith("tests/x") for call in calls) == 1
    machines = [call.split("--machine ")[1].split()[0] for call in calls if "--machine" in call]
    assert machines == [
        "roofline", "step_one", "step_two", "weights", "end_to_end", "compiled_one", "compiled_two"
    ]  # fmt: skip
    # Peak memory is measured of the required steps.
    assert [c.split("--machine ")[1].split()[0] for c in calls if "--machine" in c and "--no-memory" not in c] == [
        "step_one", "step_two"
    ]  # fmt: skip
    assert all("--device cpu --scale quick --batch 8" in call for call in calls if "--machine" in call)
    assert next(call for call in calls if "report" in call).count(".json") == 7
    tables, parts = done.stdout.split("the tables\n")
    assert "| step_one |" not in tables
    assert parts.count(" | required | done | ") == 7
    assert parts.count(" | optional | done | ") == 2
    assert "INCOMPLETE" not in parts


def test_steps_are_timed_at_several_batch_sizes(tmp_path: Path) -> None:
    done, calls = run(tmp_path, MODELS="one", INSTALL="0", BATCH="8 4")
    assert done.returncode == 0, done.stderr
    found = [re.search(r"--batch (\d+) .*--machine (\S+)", call) for call in calls if "--machine" in call]
    assert [(m[2], m[1]) for m in found if m] == [
        ("roofline", "8"), ("step_one_8", "8"), ("step_one_4", "4"), ("weights", "8"), ("end_to_end", "8"),
        ("compiled_one", "8"),
    ]  # fmt: skip


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    begin = time.monotonic()
    done, _ = run(tmp_path, MODELS="one", INSTALL="0", BREAK="roofline", HANG="step_one", TIME="18")
    assert time.monotonic() - begin < 30
    assert done.returncode == 1
    assert "| roofline | required | failed with status 3, see roofline.log |" in done.stdout
    assert "| step_one | required | stopped at its limit |" in done.stdout
    assert "| end_to_end | required | no time left |" in done.stdout
    assert "| compiled_one | optional | no time left |" in done.stdout
    assert done.stdout.endswith(
        "INCOMPLETE, required parts are missing: roofline (failed with status 3, see roofline.log); "
        "step_one (stopped at its limit); weights (no time left); end_to_end (no time left).\n"
        "Nothing was measured.\n"
    )


def test_an_optional_part_that_is_cut_is_no_failure(tmp_path: Path) -> None:
    done, _ = run(tmp_path, MODELS="one", INSTALL="0", HANG="compiled_one", TIME="23")
    assert "| compiled_one | optional | stopped at its limit |" in done.stdout
    assert "| end_to_end | required | done |" in done.stdout
    assert "INCOMPLETE" not in done.stdout
    assert done.returncode == 0


def test_required_parts_fit_into_the_time() -> None:
    script = SCRIPT.read_text()
    limits = [int(n) for n in re.findall(r"^\s*(?:part|bench) required \w+ (\d+)", script, re.MULTILINE)]
    (steps,) = re.findall(r"\$\(\((\d+) / \$\{#models", script)
    assert len(limits) == 5  # install, tests, roofline, weights, end_to_end
    assert sum(limits) + int(steps) <= 600 - 15 - 60  # and some is left for the others


def test_nothing_of_others_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("cpu_amd_epyc_2_threads.json", "metrics.json", "roofline.json"):
        (tmp_path / "out" / name).write_text("of before")
    done, calls = run(tmp_path, MODELS="one", INSTALL="0", BREAK="roofline")
    assert done.returncode == 1
    left = {path.name for path in (tmp_path / "out").glob("*.json") if path.read_text() == "of before"}
    assert left == {"cpu_amd_epyc_2_threads.json", "metrics.json"}
    (report,) = (call for call in calls if "report" in call)
    assert "metrics.json" not in report
    assert "roofline.json" not in report


def test_the_sanitizer_runs_the_kernel_tests_of_small_shapes(tmp_path: Path) -> None:
    sanitizer = tmp_path / "sanitizer"
    # Notes its options, runs the command, and finds an error if it is told to.
    sanitizer.write_text(
        """#!/bin/sh
printf '%s ' sanitizer "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$NOTES/calls"
while [ "$1" != "$PYTHON" ]; do printf '%s ' "$1" >> "$NOTES/calls"; shift; done
"$@" && exit ${FOUND:-0}
"""
    )
    sanitizer.chmod(sanitizer.stat().st_mode | stat.S_IXUSR)
    for found, word in (("0", "done"), ("1", "failed with status 1, see sanitizer.log")):
        done, calls = run(tmp_path, MODELS="one", INSTALL="0", SANITIZER=str(sanitizer), FOUND=found)
        assert done.returncode == int(found)
        assert f"| sanitizer | optional | {word} |" in done.stdout
    call = next(call for call in calls if call.startswith("sanitizer"))
    assert call.startswith("sanitizer 1 --error-exitcode 1 --report-api-errors no -m pytest")
    assert "tests/kernels -k not (4096 or " in call


def test_without_a_sanitizer_the_summary_says_so(tmp_path: Path) -> None:
    done, calls = run(tmp_path, MODELS="one", INSTALL="0", SANITIZER=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert f"| sanitizer | optional | {tmp_path / 'none'} not found | |" in done.stdout
    assert not any("-k not (" in call for call in calls)


def test_without_a_gpu_nothing_runs(tmp_path: Path) -> None:
    done, calls = run(tmp_path, UNREADY="1")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "what has to be installed" in done.stdout
    assert not [call for call in calls if call.startswith("-m")]


def test_it_says_what_pytorch_does_not_find(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "finds no GPU" in done.stderr


def test_without_time_nothing_is_measured(tmp_path: Path) -> None:
    done, _ = run(tmp_path, INSTALL="0", TIME="0")
    assert done.returncode == 1
    assert "| roofline | required | no time left | 0 s |" in done.stdout
    assert "INCOMPLETE, required parts are missing: tests (no time left); roofline" in done.stdout
    assert done.stdout.endswith("Nothing was measured.\n")


def test_a_real_run_on_the_cpu(tmp_path: Path) -> None:
    """All parts with the suite itself, as small as they can be."""
    for name in ("diffusers", "sklearn", "pytest_benchmark"):
        pytest.importorskip(name)
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): ...\n")
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path / "out")],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SANITIZER": "no-sanitizer", "INSTALL": "0"}
        | {"DEVICE": "cpu", "MODELS": "tiny", "SCALE": "quick", "BATCH": "10", "TIME": "3000"}
        | {"TESTS": str(tmp_path / "test_nothing.py")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "| compiled_tiny | optional | nothing of it at this scale |" in done.stdout
    assert done.stdout.count(" | required | done | ") == 5
    found = {}
    for path in (tmp_path / "out").glob("*.json"):
        record = json.loads(path.read_text())
        found[path.stem] = {entry["group"] for entry in record["benchmarks"]}
    assert found == {
        "roofline": {"fused ops"},
        "step_tiny": {"full training step"},
        "weights": {"Nash/PCGrad weights"},
        "end_to_end": {"end-to-end training to a fixed loss"},
    }
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in done.stdout
    assert all(group in report for groups in found.values() for group in groups)
