"""Run ``program.py`` in empty environments with a wheel: ``python check.py dist --torch 2.9.1 2.13.0``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PROGRAM = Path(__file__).with_name("program.py")
# Where PyTorch is older than what the newest NumPy has taken away.
OLD_TORCH = "numpy<2.4"


def check(wheel: Path, torch: str) -> None:
    """Run the program in a new environment that has the wheel, this PyTorch and what both need.

    Raises:
        SystemExit: something cannot be installed, or the program failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        _run([python, "-m", "pip", "install", "--quiet", f"torch=={torch}", OLD_TORCH], folder)
        _run([python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", wheel.resolve()], folder)
        _run([python, "-I", PROGRAM], folder)


def _run(command: list[str | Path], folder: str) -> None:
    done = subprocess.run([str(part) for part in command], cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"wheel: {' '.join(map(str, command))} ended with status {done.returncode}")


def main() -> None:
    """Check the newest wheel of a folder with every PyTorch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="has the wheels")
    parser.add_argument("--torch", nargs="+", required=True, help="versions of PyTorch")
    options = parser.parse_args()
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(options.folder.glob(f"*-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{options.folder}: expected a wheel for {tag}, found none")
    for torch in options.torch:
        check(found[-1], torch)


if __name__ == "__main__":
    main()
