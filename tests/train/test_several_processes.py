"""Two processes train together: one log, one checkpoint that a single process reads, the order of one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from diffmtl_fast.run.trained_denoiser import load
from diffmtl_fast.run.training import train
from diffmtl_fast.train import checkpoint, history
from diffmtl_fast.train.config import Component, to_dict
from diffmtl_fast.train.folder import RunFolder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU for each process")
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "--rdzv-endpoint", "localhost:0"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


def launch(launcher, config, run, tmp_path):
    """`diffmtl-fast train` in two processes."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    command = ["-m", "diffmtl_fast.cli", "train", "--config", str(file), "--run-dir", str(run.path)]
    return in_two_processes(launcher, command, tmp_path)


def in_two_processes(launcher, command, tmp_path):
    folders = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *command],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "launcher", "sharding"),
    [("vanilla", "torchrun", "none"), ("nash", "accelerate", "none"), ("nash", "torchrun", "fsdp2")],
)
def test_two_processes_and_then_one(tiny, tmp_path, method, launcher, sharding):
    options = {"method": method, "checkpoints": {"every": 1}, "compute": {"sharding": sharding}}
    run = RunFolder(tmp_path / "run")
    done = launch(launcher, tiny(**options, iterations=2), run, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 1
    assert run.samples.exists()
    assert [line["iteration"] for line in history.read(run.log)] == [2]
    paths = checkpoint.checkpoints(run.checkpoints)
    assert [path.name for path in paths] == ["iter-00000001", "iter-00000002"]
    assert all((path / "shards").exists() == (sharding == "fsdp2") for path in paths)
    longer = tiny(**options, iterations=3)
    train(longer, run, resume=True, outputs=False)
    assert [line["iteration"] for line in history.read(run.log)] == [2, 3]
    if sharding == "fsdp2":
        before, after = (load(run, longer, path).model for path in checkpoint.checkpoints(run.checkpoints))
        moved = [(a - b).abs().max() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
        assert 0 < max(moved) < 0.1


RUNS = """
import sys
from pathlib import Path

import torch.distributed as dist

from diffmtl_fast.train.config import read
from diffmtl_fast.train.folder import RunFolder
from diffmtl_fast.run.training import train

dist.init_process_group("gloo")
for file in map(Path, sys.argv[1:]):
    train(read(file), RunFolder(file.with_suffix("")), outputs=False)
dist.destroy_process_group()
"""


def test_sharded_training_is_training(tiny, tmp_path):
    """The same weights and pictures as two processes with whole models, read by one process."""
    (tmp_path / "runs.py").write_text(RUNS)
    configs = {}
    for method in ("vanilla", "nash"):
        for sharding in ("none", "fsdp2"):
            config = tiny(method=method, iterations=3, compute={"sharding": sharding}, ema_decay=0.5)
            configs[f"{method} {sharding}"] = config
            (tmp_path / f"{method} {sharding}.yaml").write_text(yaml.safe_dump(to_dict(config)))
    files = [str(tmp_path / f"{name}.yaml") for name in configs]
    done = in_two_processes("torchrun", [str(tmp_path / "runs.py"), *files], tmp_path)
    assert done.returncode == 0, done.stderr
    labels = torch.arange(4)
    for method in ("vanilla", "nash"):
        whole, sharded = (
            load(RunFolder(tmp_path / name), configs[name]) for name in (f"{method} none", f"{method} fsdp2")
        )
        torch.testing.assert_close(sharded.model.state_dict(), whole.model.state_dict(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sharded.draw(labels, 4, 0), whole.draw(labels, 4, 0), rtol=1e-3, atol=1e-3)


MODULE = """
import os, signal, torch

class Denoiser(torch.nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 4), (4, 1)))

    def forward(self, x, t, class_labels=None):
        self.calls += self.training
        if self.calls == 4 and os.environ.get("RANK") == "1":  # one call at the start of training, then one a step
            os.kill(os.getpid(), signal.SIGTERM)
        return self.blocks[1](torch.tanh(self.blocks[0](x)))
"""


def test_a_signal_to_one_process_stops_all_at_the_same_step(tiny, tmp_path, monkeypatch):
    (tmp_path / "stopping_model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(
        tiny(method="vanilla", iterations=5, checkpoints={"every": 50}, compute={"sharding": "fsdp2"}),
        model=Component("stopping_model.Denoiser"),
    )
    run = RunFolder(tmp_path / "run")
    done = launch("torchrun", config, run, tmp_path)
    assert done.returncode != 0
    assert "error: stopped with another process at iteration 3; --resume continues" in done.stderr
    assert "error: terminated at iteration 3; --resume continues" in done.stderr
    assert [path.name for path in checkpoint.checkpoints(run.checkpoints)] == ["iter-00000003"]
    train(config, run, resume=True, outputs=False)
    assert [line["iteration"] for line in history.read(run.log)] == [2, 4, 5]
