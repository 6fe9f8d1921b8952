"""Peak memory of a piece of work, in a process that has done nothing before."""

from __future__ import annotations

import ctypes
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from benchmarks.harness import Candidate

P = ParamSpec("P")
T = TypeVar("T")

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_PRELOADED = (
    "benchmarks.groups.step",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.transformers.dit_transformer_2d",
)


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a process that is forked from one in which modules were imported and nothing else done.

    Such a process starts at once, holds no memory of earlier work and has not touched any accelerator. The
    function and its arguments have to be picklable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


class LeftOut(RuntimeError):
    """Work of others failed while its memory was measured. Its gate fails, too, and then gives the reason."""


def peak_of(build: Callable[[], Sequence[Candidate]], name: str, device: torch.device) -> int:
    """Build the ways of a benchmark, and return the peak memory of one of them, as `peak` does.

    Raises:
        LeftOut: the way is the work of others, and failed.
    """
    torch.manual_seed(0)
    candidate = next(candidate for candidate in build() if candidate.name == name)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="There is a performance drop"
        )  # also shown when it is timed
        try:
            return peak(candidate.run, device)
        except Exception as failure:
            if candidate.peer:
                raise LeftOut(f"{type(failure).__name__}: {failure}") from failure
            raise


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
    # Lets malloc return freed blocks to the system at once, so that no later run finds them already resident.
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
