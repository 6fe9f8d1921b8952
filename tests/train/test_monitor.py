"""Losses on held-out samples and pictures during training: right, in every log, and of no influence."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffmtl_fast._errors import UserError
from diffmtl_fast.data import FileData
from diffmtl_fast.run.training import train
from diffmtl_fast.train import checkpoint, history
from diffmtl_fast.train.folder import RunFolder
from diffmtl_fast.train.loop import Trainer
from diffmtl_fast.train.monitor import HeldOutLoss

EVERY = {"validation_every": 2, "validation_samples": 30}


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_the_loss_of_a_cluster_is_that_of_its_samples(tiny, process):
    trainer = Trainer(tiny(process=process, evaluation=EVERY))
    measure, model = HeldOutLoss(trainer), trainer.ema.model
    found = measure(model)
    assert torch.equal(measure(model), found)
    assert torch.equal(HeldOutLoss(trainer)(model), found)
    assert measure._clusters.bincount().tolist() == [10] * 3
    assert torch.equal(trainer.clusters.assign(measure._levels), measure._clusters)
    x, labels = measure._batch.x, measure._batch.conditioning
    known = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(trainer.data.test, trainer.data.test_labels, strict=True)
    }
    assert [known[image.numpy().tobytes()] for image in x] == labels.tolist()
    of_process, noise, level = trainer.process, measure._noise, measure._levels
    with torch.no_grad():
        noisy, told = of_process.inputs(of_process.noisy(x, noise, level), level)
        losses = of_process.loss(model(noisy, told, class_labels=labels).sample, x, noise, level)
    expected = torch.stack([losses[measure._clusters == cluster].mean() for cluster in range(3)])
    torch.testing.assert_close(found, expected)


def test_what_is_measured_is_in_every_log_and_changes_nothing(tiny, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain, run = RunFolder(tmp_path / "plain"), RunFolder(tmp_path / "run")
    train(tiny(), plain, outputs=False)
    given = {"evaluation": EVERY, "logging": {"tensorboard": True, "pictures_every": 4, "wandb": "digits"}}
    logged, begun = [], []
    monkeypatch.setitem(sys.modules, "wandb", _wandb(logged, begun))
    step = Trainer.step

    class Killed(BaseException):
        pass

    def stopping(self, log):
        if self.iteration == 5:
            raise Killed
        step(self, log)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(Killed):
        train(tiny(**given), run, outputs=False)
    monkeypatch.setattr(Trainer, "step", step)
    train(tiny(**given), run, resume=True)
    last = [checkpoint.checkpoints(each.checkpoints)[-1] / "model.safetensors" for each in (plain, run)]
    if tiny().device == "cpu":
        assert last[0].read_bytes() == last[1].read_bytes()

    lines = history.read(run.log)
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    assert all(len(line["validation"]) == 3 for line in lines)
    assert len({tuple(line["validation"]) for line in lines}) == 3
    board = events.EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("validation/cluster_2")] == [2, 4, 6]
    assert [event.step for event in board.Images("samples")] == [4, 6]
    assert run.training.exists()

    assert [each["id"] for each in begun] == [begun[0]["id"]] * 2
    assert {each["project"] for each in begun} == {"digits"}
    assert begun[0]["config"]["batch_size"] == 12
    scalars = {at: values for values, at in logged if "loss" in values}
    assert scalars[4]["validation/cluster_1"] == lines[1]["validation"][1]
    pictures = [(values["samples"], at) for values, at in logged if "samples" in values]
    assert [at for _, at in pictures] == [4, 6]
    assert [image.shape for image in pictures[0][0]] == [(8, 8, 1)] * 16


def _wandb(logged, begun):
    """A stand-in that keeps what it is told."""

    class Run:
        def log(self, values, step):
            logged.append((values, step))

        def finish(self):
            logged.append(({}, -1))

    def init(**given):
        begun.append(given)
        return Run()

    return types.SimpleNamespace(init=init, Image=np.asarray)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluation": {"validation_every": 3}},
            r"evaluation\.validation_every: expected a multiple of .* 2, found 3",
        ),
        (
            {"logging": {"pictures_every": 2}},
            r"logging\.pictures_every: expected 0 without logging\.tensorboard and",
        ),
    ],
)
def test_bad_options_are_named(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_without_wandb_the_extra_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb: .*pip install 'diffmtl-fast\[wandb\]'"):
        train(tiny(logging={"wandb": "digits"}), RunFolder(tmp_path / "run"))


def test_data_without_held_out_samples_are_refused(tiny):
    trainer = Trainer(tiny(evaluation=EVERY))
    trainer.data = FileData(trainer.data.training, None, 10)
    with pytest.raises(UserError, match=r"validation_every: expected 0 for data that hold out no samples"):
        HeldOutLoss(trainer)


def test_half_precision_and_captions(tiny):
    """Captions are taken part by part, as batches have them."""
    trainer = Trainer(tiny(evaluation={**EVERY, "validation_samples": 31}, precision="bf16"))
    measure = HeldOutLoss(trainer)
    single = Trainer(tiny(evaluation={**EVERY, "validation_samples": 31}))
    torch.testing.assert_close(
        measure(trainer.ema.model), HeldOutLoss(single)(single.ema.model), rtol=0.05, atol=0
    )
    texts = [str(label) for label in measure._batch.conditioning.tolist()]
    expected = measure(trainer.ema.model)
    measure._batch = replace(measure._batch, conditioning=texts)
    measure._conditioning = _OfText()
    assert torch.equal(measure(trainer.ema.model), expected)


class _OfText:
    def arguments(self, values):
        return {"class_labels": torch.tensor([int(text) for text in values])}
