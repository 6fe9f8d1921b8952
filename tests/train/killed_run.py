"""A process that has imported everything, and forks runs of the command line for tests to kill."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any


class Forks:
    """Runs of the command line, each a fork of one process that no import holds up any more."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, arguments: list[str], output: Path) -> int:
        """Run it in the process itself, which then has what runs import; returns the exit status."""
        return self._ask("run", arguments, str(output))

    def start(self, arguments: list[str], output: Path, outputs: bool = True) -> int:
        """Start it, with what it prints in a file, without pictures if asked; returns its process's number."""
        return self._ask("start", arguments, str(output), outputs)

    def wait(self, process: int, cpu_seconds: float = float("inf")) -> int | None:
        """The exit code, negative if a signal has ended it; None if it still runs after that much work."""
        clock = (~process << 3) | 2  # what clock_getcpuclockid(3) gives: moments do not depend on the load
        while (ended := self._ask("poll", process)) is None:
            if time.clock_gettime(clock) >= cpu_seconds:
                break
            time.sleep(0.002)
        return ended

    def cpu_seconds(self, arguments: list[str], output: Path, outputs: bool) -> float:
        """What a run costs that nothing stops."""
        process = self.start(arguments, output, outputs)
        clock, spent = (~process << 3) | 2, 0.0
        while self._ask("poll", process) is None:
            with contextlib.suppress(OSError):  # it has ended since
                spent = time.clock_gettime(clock)
            time.sleep(0.02)
        return spent

    def close(self) -> None:
        """End the process."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, *request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    with open(os.dup(1), "w") as answers:
        for line in sys.stdin:
            kind, *given = json.loads(line)
            if kind == "run":
                answer: int | None = _command(*given)
            elif kind == "start":
                answer = os.fork()
                if answer == 0:
                    os._exit(_command(*given))
            else:
                ended, status = os.waitpid(given[0], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if ended else None
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _command(arguments: list[str], output: str, outputs: bool = True) -> int:
    from diffmtl_fast.cli import main
    from diffmtl_fast.run import training

    if not outputs:  # they are most of a tiny run's time
        training.rehearse = training._write_outputs = lambda *_: None
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        return main(arguments)
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
