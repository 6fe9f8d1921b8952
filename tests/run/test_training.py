"""Runs: started, stopped, continued, finished, refused."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from diffmtl_fast._errors import Interrupted, UserError
from diffmtl_fast.run import plots
from diffmtl_fast.run.trained_denoiser import TrainedDenoiser, load
from diffmtl_fast.run.training import train
from diffmtl_fast.train import checkpoint
from diffmtl_fast.train.config import Sampling
from diffmtl_fast.train.data import ImageData
from diffmtl_fast.train.folder import RunFolder
from diffmtl_fast.train.history import History
from diffmtl_fast.train.loop import Trainer


class Killed(BaseException):
    """Ends a run where it stands, as a kill does."""


@pytest.fixture
def kill(monkeypatch):
    """Stop training when an iteration is reached."""

    def at(iteration):
        step = Trainer.step

        def stopping(self, history):
            if self.iteration == iteration:
                raise Killed
            step(self, history)

        monkeypatch.setattr(Trainer, "step", stopping)
        return lambda: monkeypatch.setattr(Trainer, "step", step)

    return at


def weights(run):
    last = checkpoint.checkpoints(run.checkpoints)[-1]
    return last.name, *((last / f"{name}.safetensors").read_bytes() for name in ("model", "ema"))


def log(run):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in run.log.open()]


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "a")


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tiny, run, monkeypatch, number, word):
    config, step = tiny(method="vanilla", iterations=5, checkpoints={"every": 50}), Trainer.step

    def signalled(self, history):
        step(self, history)
        if self.iteration == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(Trainer, "step", signalled)
    with pytest.raises(Interrupted, match=f"^{word} at iteration 3; --resume continues from there$"):
        train(config, run, outputs=False)
    assert signal.getsignal(number) is before
    assert weights(run)[0] == "iter-00000003"
    train(config, run, resume=True, outputs=False)
    assert weights(run)[0] == "iter-00000005"


def test_a_signal_to_all_processes_of_a_run_lets_its_workers_finish_the_step(
    tiny, run, tmp_path, monkeypatch
):
    rng, before, forward = np.random.default_rng(0), set(active_children()), UNet2DModel.forward
    (tmp_path / "pictures").mkdir()
    for index in range(30):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        picture.save(tmp_path / "pictures" / f"{index}.png")
    args = {"folder": str(tmp_path / "pictures"), "size": 8, "channels": 1}
    options = {"batch_size": 4, "accumulate": 8, "workers": 1, "iterations": 2}
    data = {"path": "diffmtl_fast.data.image_folder", "args": args}
    config = tiny(**options, data=data, model={"args": {"num_class_embeds": None}})

    def signalled(self, *args, **kwargs):
        workers = set(active_children()) - before
        if workers and not hasattr(self, "told"):  # in the first of the step's batches
            self.told = True
            for number in (*(worker.pid for worker in workers), os.getpid()):
                os.kill(number, signal.SIGTERM)
            time.sleep(0.5)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DModel, "forward", signalled)
    with pytest.raises(Interrupted, match="terminated at iteration 1"):
        train(config, run, outputs=False)
    assert set(active_children()) == before
    assert weights(run)[0] == "iter-00000001"


def test_continuous_uncertainty_leaves_a_picture_of_what_it_learned(tiny, run, monkeypatch):
    drawn = []
    draw = plots.uncertainty
    monkeypatch.setattr(plots, "uncertainty", lambda *given: (drawn.append(given), draw(*given)))
    train(tiny(method="continuous_uw", iterations=3), run)
    assert run.uncertainty.read_bytes().startswith(b"\x89PNG")
    (_, levels, log_var, centres, log_losses, title), trained = drawn[0], Trainer(run.read_config())
    trained.load(run.checkpoint(), History(run.log))
    found = trained.weighting.log_var(torch.from_numpy(levels).float())
    assert torch.equal(found, torch.from_numpy(log_var))
    assert (log_var != 0).any()
    assert levels.shape == (20,)
    assert centres.shape == log_losses.shape == (trained.clusters.k,)
    assert "continuous uncertainty" in title
    run.remove_outputs()
    assert not run.uncertainty.exists()


def test_a_run_leaves_everything_and_is_then_complete(tiny, run, capsys):
    config = tiny(evaluation={"num_samples": 20}, logging={"tensorboard": True}, iterations=2)
    train(config, run)
    names = {path.name for path in run.path.iterdir()} - {".lock"}
    assert names == {
        "checkpoints", "clusters.png", "config.yaml", "log.jsonl", "metrics.json", "model", "samples.png",
        "tensorboard", "training.png",
    }  # fmt: skip
    assert run.read_config() == config

    model = diffusers.UNet2DModel.from_pretrained(run.model)
    trained = load(run, config)
    for ours, theirs in zip(trained.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)

    metrics = json.loads(run.metrics.read_text())
    assert metrics["iterations"] == 2
    assert metrics["samples"]["frechet_distance"] > metrics["floor"]["frechet_distance"]
    if config.device == "cpu":
        assert trained.evaluate() == metrics

    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    capsys.readouterr()
    train(config, run, resume=True)
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before

    run.samples.unlink()
    train(config, run, resume=True)
    assert run.samples.exists()
    assert run.metrics.stat().st_mtime_ns == before[run.metrics]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_killed_run_ends_like_one_that_was_not(tiny, run, tmp_path, kill, stop):
    config = tiny(logging={"every": 3})
    whole = RunFolder(tmp_path / "whole")
    train(config, whole)
    revive = kill(stop)
    with pytest.raises(Killed):
        train(config, run, resume=True)
    revive()
    (run.path / ".tmp-1-model").mkdir()  # half-written when the process was killed
    train(config, run, resume=True)
    if config.device == "cpu":
        assert weights(run) == weights(whole)
        assert log(run) == log(whole)
    assert [line["iteration"] for line in log(run)] == [3, 6]
    assert not list(run.path.glob(".tmp-*"))


def test_a_run_can_be_made_longer(tiny, run, tmp_path):
    whole = RunFolder(tmp_path / "whole")
    train(tiny(iterations=6), whole)
    train(tiny(iterations=4), run)
    short = run.samples.read_bytes()
    train(tiny(iterations=6), run, resume=True)
    if tiny().device == "cpu":
        assert weights(run) == weights(whole)
    assert run.samples.read_bytes() != short
    assert run.read_config().iterations == 6
    with pytest.raises(UserError, match="iterations: expected at least 6"):
        train(tiny(iterations=4), run, resume=True)


def test_training_goes_back_from_a_corrupt_checkpoint_and_says_so(tiny, run, tmp_path, capsys):
    config = tiny()
    train(config, run)
    expected, lines = weights(run), log(run)
    newer = checkpoint.checkpoints(run.checkpoints)[-1]
    (newer / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"--checkpoint: expected one of .* \(iter-00000004, iter-00000006\)"):
        train(config, run, resume=True, chosen=tmp_path / "iter-00000004")
    with pytest.raises(UserError, match=r"corrupt: model\.safetensors .*; --checkpoint .*iter-00000004"):
        train(config, run, resume=True, chosen=newer)  # the one that was asked for, or none
    assert load(run, config).iteration == 4
    train(config, run, resume=True)
    assert "is corrupt: model.safetensors" in capsys.readouterr().err
    if config.device == "cpu":
        assert weights(run) == expected
        assert log(run) == lines
    for path in checkpoint.checkpoints(run.checkpoints):
        (path / "state.pt").unlink()
    with pytest.raises(UserError, match="the older ones are corrupt too"):
        train(config, run, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "pcgrad"},
            "method: expected 'uw', as in the run that --resume continues, found 'pcgrad'",
        ),
        ({"clusters": {"k": 2}}, "clusters.k: expected 3"),
        ({"model": {"args": {"dropout": 0.5}}}, "model.args.dropout: expected None"),
        ({"optimizer": {"lr": 1.0}}, "optimizer.lr: expected 0.001"),
    ],
)
def test_a_changed_configuration_is_refused_by_name(tiny, run, kill, changes, message):
    kill(0)
    with pytest.raises(Killed):
        train(tiny(), run)
    with pytest.raises(UserError) as caught:
        train(tiny(**changes), run, resume=True)
    assert str(caught.value).startswith(message)


def test_options_that_do_not_matter_may_change(tiny, run, kill):
    revive = kill(3)
    with pytest.raises(Killed):
        train(tiny(), run)
    revive()
    train(tiny(checkpoints={"every": 1, "keep": 1}), run, resume=True)
    assert len(checkpoint.checkpoints(run.checkpoints)) == 1


def test_an_existing_run_is_refused_without_resume(tiny, run, kill):
    kill(0)
    with pytest.raises(Killed):
        train(tiny(), run)
    with pytest.raises(UserError, match="--resume continues it"):
        train(tiny(), run)


def test_a_folder_of_other_things_is_refused(tiny, run):
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(UserError, match="expected a run or nothing"):
            train(tiny(), run, resume=resume)


def test_a_bad_option_leaves_no_folder(tiny, run):
    with pytest.raises(UserError, match="clusters: k: expected 1 <= k <= T = 20"):
        train(tiny(clusters={"k": 21}), run)
    assert not run.path.parent.exists()


def test_only_one_process_at_a_time(tiny, run):
    run.create()
    with run.lock(), pytest.raises(UserError, match="another process"):
        train(tiny(), run, resume=True)


def test_a_lock_file_of_a_process_that_was_killed_is_taken_over(tiny, run, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run.create()
    gone = subprocess.Popen(["true"])
    gone.wait()
    file = run.path / ".lock-file"
    file.write_text(f"{gone.pid} on {platform.node()}")
    with run.lock():
        assert file.read_text() == f"{os.getpid()} on {platform.node()}"
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), run.lock():
            raise AssertionError("not reached")
    assert not file.exists()


def test_a_finished_run_without_checkpoints_is_left_alone(tiny, run):
    train(tiny(), run)
    shutil.rmtree(run.checkpoints)
    before = sorted(path.name for path in run.path.iterdir())
    with pytest.raises(UserError, match="training anew would delete its model"):
        train(tiny(), run, resume=True)
    assert sorted(path.name for path in run.path.iterdir()) == before


@pytest.mark.parametrize("part", ["device", "clusters", "optimizer", "generator", "history", "timesteps"])
def test_a_state_without_a_part_is_one_error(tiny, run, kill, part):
    continued = kill(4)
    with pytest.raises(Killed):
        train(tiny(), run)
    continued()
    last = checkpoint.checkpoints(run.checkpoints)[-1]
    state = torch.load(last / "state.pt", weights_only=True)
    del state[part]
    torch.save(state, last / "state.pt")
    manifest = json.loads((last / "manifest.json").read_text())
    manifest["sha256"]["state.pt"] = hashlib.sha256((last / "state.pt").read_bytes()).hexdigest()
    (last / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"state\.pt does not fit: KeyError: '{part}'"):
        train(tiny(), run, resume=True)


@pytest.mark.parametrize("where", ["below a file", "read-only", "a file"])
def test_a_folder_that_cannot_be_written(tiny, tmp_path, where):
    path = tmp_path / "place"
    if where == "read-only":
        path.mkdir(mode=0o555)
    else:
        path.touch()
    run = RunFolder(path if where == "a file" else path / "run")
    with pytest.raises(UserError, match=r"run folder .*: cannot be (read|written to)"):
        train(tiny(), run, resume=True)


@pytest.mark.skipif(not os.path.ismount("/sys"), reason="needs a file system that nobody can write to")
def test_a_file_system_that_cannot_be_written(tiny):
    with pytest.raises(UserError, match="run folder /sys/kernel/run: cannot be written to"):
        train(tiny(), RunFolder(Path("/sys/kernel/run")))


def test_another_type_of_device_is_refused(tiny, run, kill):
    revive = kill(3)
    with pytest.raises(Killed):
        train(tiny(), run)
    revive()
    path = checkpoint.checkpoints(run.checkpoints)[-1]
    state = {**checkpoint.load_state(path), "device": "abacus"}
    checkpoint.save(run.checkpoints, 2, {"model": torch.nn.Linear(1, 1)}, state, keep=2)
    with pytest.raises(UserError, match="device: expected abacus"):
        train(tiny(), run, resume=True)


def test_sampling_options_do_not_touch_the_run(tiny, run):
    train(tiny(iterations=1), run)
    config = replace(run.read_config(), sampling=Sampling(steps=1, batch_size=3))
    labels = torch.tensor([1, 2, 3, 4, 5])
    trained = load(run, config)
    pictures = trained.draw(labels, 5, seed=3)
    assert pictures.shape == (5, 1, 8, 8)
    torch.testing.assert_close(pictures, trained.draw(labels, 5, seed=3))
    with pytest.raises(UserError, match=r"evaluation\.num_samples: expected more than 3, found 2"):
        trained.evaluate(2)


def test_nothing_to_load(tiny, run, kill):
    with pytest.raises(UserError, match="expected a run, found none"):
        run.read_config()
    kill(0)
    with pytest.raises(Killed):
        train(tiny(), run)
    with pytest.raises(UserError, match="expected a checkpoint, found none yet"):
        load(run, run.read_config())


@pytest.mark.parametrize(("classes", "rows"), [(3, 3), (20, 20), (1000, 20)])
def test_samples_are_of_twenty_classes_at_most(tiny, tmp_path, monkeypatch, classes, rows):
    images = torch.zeros(classes, 1, 4, 4)
    data = ImageData(images, torch.arange(classes), images, torch.arange(classes))
    trained = TrainedDenoiser(tiny(), data, None, torch.nn.Identity(), 0)
    drawn = []

    def draw(self, labels, count, seed):
        drawn.append(labels)
        return torch.zeros(count, 1, 4, 4)

    monkeypatch.setattr(TrainedDenoiser, "draw", draw)
    monkeypatch.setattr("diffmtl_fast.run.plots.samples", lambda path, *rest: path.touch())
    trained.write_samples(tmp_path / "samples.png")
    shown = drawn[0].unique()
    assert len(drawn[0]) == max(10 * rows, 100)
    assert len(shown) == rows
    assert (shown.min(), shown.max()) == (0, classes - classes // rows)
