"""The order and the time limits of gpu.sh, with a stand-in for Python that only notes what it is asked to do."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

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
sys.exit(1 if "-c" in args else 0)
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
    return done, (folder / "calls").read_text().splitlines()


def test_parts_run_in_order_and_tables_come_last(tmp_path: Path) -> None:
    done, calls = run(tmp_path, MODELS="one two", DEVICE="cpu", BATCH="8", SCALE="quick", TESTS="tests/x")
    assert done.returncode == 0, done.stderr
    assert "install --no-build-isolation --no-deps -e ." in calls[0]
    assert calls[2].endswith("tests/x")
    machines = [call.split("--machine ")[1].split()[0] for call in calls if "--machine" in call]
    assert machines == [
        "roofline", "step_one", "step_two", "compiled_one", "compiled_two", "weights", "end_to_end"
    ]  # fmt: skip
    assert all("--device cpu --scale quick --batch 8" in call for call in calls if "--machine" in call)
    assert next(call for call in calls if "report" in call).count(".json") == 7
    tables, parts = done.stdout.split("the tables\n")
    assert "| step_one |" not in tables
    assert parts.count(" | done | ") == 9


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    begin = time.monotonic()
    done, _ = run(tmp_path, MODELS="one", INSTALL="0", BREAK="roofline", HANG="step_one", TIME="18")
    assert time.monotonic() - begin < 30
    assert done.returncode == 1
    assert "| roofline | failed with status 3, see roofline.log |" in done.stdout
    assert "| step_one | stopped at its limit |" in done.stdout
    assert "| end_to_end | no time left |" in done.stdout


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
        assert f"| sanitizer | {word} |" in done.stdout
    call = next(call for call in calls if call.startswith("sanitizer"))
    assert call.startswith("sanitizer 1 --error-exitcode 1 --report-api-errors no -m pytest")
    assert "tests/kernels -k not (4096 or " in call


def test_without_a_sanitizer_the_summary_says_so(tmp_path: Path) -> None:
    done, calls = run(tmp_path, MODELS="one", INSTALL="0", SANITIZER=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert f"| sanitizer | {tmp_path / 'none'} not found | |" in done.stdout
    assert not any("-k not (" in call for call in calls)


def test_without_time_nothing_is_measured(tmp_path: Path) -> None:
    done, _ = run(tmp_path, INSTALL="0", TIME="0")
    assert done.returncode == 1
    assert "| roofline | no time left | |" in done.stdout
    assert done.stdout.endswith("Nothing was measured.\n")
