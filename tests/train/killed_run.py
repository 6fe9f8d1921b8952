"""The command line in a process that is forked, so that a run to be killed starts without importing torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any


def start(arguments: list[str], output: Path) -> Any:
    """Run the command line, with what it prints in a file; the process's exit code is the command's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["diffmtl_fast.train.run", "diffmtl_fast.cli.train", "diffusers", "matplotlib"]
    )
    process = context.Process(target=_command, args=(arguments, str(output)), daemon=True)
    process.start()
    return process


def _command(arguments: list[str], output: str) -> None:
    import torch

    from diffmtl_fast.cli import main

    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(main(arguments))
