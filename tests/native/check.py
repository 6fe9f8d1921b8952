"""Build the extension with the address and undefined behaviour sanitizers and fuzz all that it holds.

    python tests/native/check.py [--seconds 60] [--seed 0]

Needs a C++ compiler with sanitizers, CMake, Ninja and pybind11. The first finding ends the run with a report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"


def tool(name: str) -> str:
    """A program beside this Python, or on the path."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SystemExit(f"expected the program {name}, found none; run `pip install {name}`")
    return found


def build() -> None:
    import pybind11

    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DDIFFMTL_SANITIZE=ON", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([tool("ninja"), "-C", str(BUILD)], check=True)


def runtime(library: str) -> str:
    """The compiler's sanitizer runtime, to load before a Python that was built without."""
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run(
        [compiler, f"-print-file-name={library}"], check=True, capture_output=True, text=True
    )
    return found.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build()
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python keeps memory until it exits; that is no leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = str(ROOT)
    for fuzzer in ("fuzz_clustering.py", "fuzz_ops.py"):
        fuzz = [sys.executable, str(Path(__file__).with_name(fuzzer)), str(BUILD)]
        fuzz += ["--seconds", str(arguments.seconds), "--seed", str(arguments.seed)]
        status = subprocess.run(fuzz, env=environment, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
