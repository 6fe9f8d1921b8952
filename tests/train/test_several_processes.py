"""Two processes train together: one log, one checkpoint that a single process reads, the order of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from diffmtl_fast.train import checkpoint, history
from diffmtl_fast.train.config import to_dict
from diffmtl_fast.train.folder import RunFolder
from diffmtl_fast.train.run import train


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU for each process")
@pytest.mark.parametrize("method", ["vanilla", "nash"])
def test_two_processes_and_then_one(tiny, tmp_path, method):
    config = tiny(method=method, iterations=2, checkpoints={"every": 1})
    file, run = tmp_path / "config.yaml", RunFolder(tmp_path / "run")
    file.write_text(yaml.safe_dump(to_dict(config)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("-m", "diffmtl_fast.cli", "train", "--config", str(file), "--run-dir", str(run.path)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 1
    assert [line["iteration"] for line in history.read(run.log)] == [2]
    assert [path.name for path in checkpoint.checkpoints(run.checkpoints)] == [
        "iter-00000001",
        "iter-00000002",
    ]
    longer = tiny(method=method, iterations=3, checkpoints={"every": 1})
    train(longer, run, resume=True, outputs=False)
    assert [line["iteration"] for line in history.read(run.log)] == [2, 3]
