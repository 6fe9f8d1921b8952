"""Peak memory of a piece of work, in a process that has done nothing before."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_PRELOADED = (
    "benchmarks.ways",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.transformers.dit_transformer_2d",
)


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module's top level in a process forked from one that has only imported things.

    Such a process starts in no time, holds no memory of earlier work and has not touched any accelerator.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak(run: Callable[[], object], device: torch.device, steps: int = 2) -> int:
    """Return by how many bytes memory rises above what is held now while ``run`` is called.

    On CUDA that is what torch allocates; on the CPU the resident set, whose high-water mark Linux lets a process
    reset. Two steps by default, as memory kept from step to step weighs on the second from its beginning.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(steps):
            run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Freed blocks then go back to the system at once, and do not count for what comes after.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(steps):
        run()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Resident bytes of this process: VmRSS now, VmHWM at the peak; getrusage would inherit the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1]) * 1024
