"""Processes of a gloo group that call what the tests ask them to."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any


class Failed(Exception):
    """An error on a rank: its type and text."""


class Pool:
    """So many ranks, each a process; `call` runs a function on all of them at once.

    Args:
        size: how many.
        folder: where they meet.
        timeout: of their collectives, in seconds.
    """

    def __init__(self, size: int, folder: Path, timeout: float = 20) -> None:
        # One process imports torch and what makes it deterministic, which takes seconds; the ranks are forked from
        # it before it has threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["diffmtl_fast", "benchmarks.reference", "torch._inductor.config"])
        self.alive, self._timeout = True, timeout
        self._connections, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            args = (there, rank, size, str(folder / "meeting"), timeout)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def results(self, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return what the function returned on every rank: its result, `Failed`, or None where the rank died."""
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((function, args, kwargs)))
        found = []
        for connection in self._connections:
            try:
                if not connection.poll(60):
                    self.alive = False
                    raise TimeoutError(f"no answer of rank {len(found)}")
                found.append(pickle.loads(connection.recv_bytes()))
            except (EOFError, ConnectionError):
                found.append(None)
        self.alive = not any(result is None or isinstance(result, Failed) for result in found)
        return found

    def call(self, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return what the function returned on every rank, where none failed."""
        found = self.results(function, *args, **kwargs)
        assert self.alive, found
        return found

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(connection: Any, rank: int, size: int, meeting: str, timeout: float) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Uninitialised memory is NaN, so that an element that nobody writes shows.
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        function, args, kwargs = pickle.loads(connection.recv_bytes())
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            traceback.print_exc()
            result = Failed(type(error).__name__, str(error))
        connection.send_bytes(pickle.dumps(result))
