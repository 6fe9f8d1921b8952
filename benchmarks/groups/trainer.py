"""What the bundled trainer costs on the digits.

- A step with its data, averages and log, beside a step of the loop of the README on the same UNet. Each passes its
  gate if its first steps lower the loss.
- Ten steps with data and log, beside the same trainer's steps on one batch from memory, of which no figures are
  kept. The gate sees that the last step is logged.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import diffmtl_fast as dm
from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Candidate
from benchmarks.names import OURS, TYPICAL_K, Group
from diffmtl_fast._extras import require
from diffmtl_fast.diffusion import log_snr

if TYPE_CHECKING:
    from diffmtl_fast.train.history import History
    from diffmtl_fast.train.loop import Trainer

LOOP = "loop of the README"
TRAINER = f"{OURS}, bundled trainer"
METHODS: dict[str, Callable[[], Any]] = {
    "uw": lambda: dm.UncertaintyWeighting(TYPICAL_K),
    "pcgrad": dm.PCGrad,
}
FIRST_STEPS = 6  # of the gate
WITHOUT, WITH = "trainer's steps without data and log", f"{OURS}, trainer"
STEPS = 10  # a line of the log is of so many, by default


def benchmarks(options: Options) -> list[Benchmark]:
    """Return the cases: a step with each of two methods, and what data and log add to ten."""
    return [*(_step(options, method) for method in METHODS), _data_and_log(options)]


def _step(options: Options, method: str) -> Benchmark:
    channels, batch = options.pick([8, 8], [48, 96]), options.pick(20, 125)

    def build() -> list[Candidate]:
        from diffmtl_fast.train.config import Config, digits, from_dict

        values = digits() | {"method": method, "batch_size": batch, "device": options.device}
        values["model"]["args"]["block_out_channels"] = channels
        config: Config = from_dict(values | {"logging": {"cosines_every": 0}})
        return [_candidate(LOOP, *_loop(config)), _candidate(TRAINER, *_trainer(config))]

    return Benchmark(
        Group.TRAINING,
        f"a step with {method}, UNet of {channels[0]} and {channels[1]} channels, batch {batch}",
        {LOOP: "limit", TRAINER: "ours"},
        build,
        options.pick(1, 15),
        {"batch": batch, "k": TYPICAL_K},
        least=0.3,
        warmup=3,
    )


def _candidate(name: str, step: Callable[[], object], loss: Callable[[], float]) -> Candidate:
    def error() -> float:
        losses = []
        for _ in range(FIRST_STEPS):
            step()
            losses.append(loss())
        return float(min(losses[1:]) >= losses[0])

    return Candidate(name, step, error)


def _loop(config: Any) -> tuple[Callable[[], object], Callable[[], float]]:
    """Return the loop of the README, with the labels that the trainer gives its model; and its last loss."""
    diffusers = require("diffusers", "train")
    from diffmtl_fast.train.data import digits

    device, data = torch.device(config.device), digits()
    scheduler = diffusers.DDPMScheduler(**config.scheduler.args)
    torch.manual_seed(config.seed)
    model = diffusers.UNet2DModel(**config.model.args).to(device)
    clusters, weighting = dm.cluster_snr(log_snr(scheduler), k=TYPICAL_K), METHODS[config.method]().to(device)
    mtl = dm.ClusteredMTL(model, num_clusters=clusters.k, weighting=weighting)
    optimizer = torch.optim.AdamW(dm.param_groups(model, weighting, lr=config.optimizer.lr, weight_decay=0.0))
    images, labels = data.train, data.train_labels
    assert labels is not None

    def step() -> None:
        chosen = torch.randint(len(images), (config.batch_size,))
        clean, own = images[chosen].to(device), labels[chosen].to(device)
        t, cluster = clusters.sample(len(clean), device=device)
        noise = torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, t)
        loss = dm.ops.sample_mse(mtl(noisy, t, cluster=cluster, class_labels=own).sample, noise)
        optimizer.zero_grad()
        mtl.backward(loss)
        optimizer.step()

    return step, lambda: _last_loss(mtl)


def _trainer(config: Any) -> tuple[Callable[[], object], Callable[[], float]]:
    """Return a step of the trainer with the lines of its log; and its last loss."""
    from diffmtl_fast.train.history import History
    from diffmtl_fast.train.loop import Trainer

    trainer = Trainer(config)
    trainer.model.train()
    log = History(Path(os.devnull))

    def step() -> None:
        trainer.step(log)
        if trainer.iteration % config.logging.every == 0:
            log.flush(trainer.iteration)

    return step, lambda: _last_loss(trainer.mtl)


def _last_loss(mtl: Any) -> float:
    return float(mtl.last.losses.mean())


def _data_and_log(options: Options) -> Benchmark:
    """Ten steps and a line of the log, with TensorBoard."""
    return Benchmark(
        Group.TRAINING,
        f"{STEPS} steps of the trainer on the digits, data and log",
        {WITHOUT: "limit", WITH: "ours"},
        partial(_with_and_without, options.device, options.pick(10, 125)),
        options.pick(1, 10, 20),
    )


def _with_and_without(device: str, batch_size: int) -> list[Candidate]:
    from diffmtl_fast.train.config import digits, from_dict
    from diffmtl_fast.train.history import History, read
    from diffmtl_fast.train.loop import Trainer
    from diffmtl_fast.train.sinks import TensorBoard

    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    config = from_dict({**digits(), "device": device, "batch_size": batch_size})
    bare, whole = Trainer(config), Trainer(config)
    batch = bare._next_batch()
    bare._next_batch = lambda: batch  # type: ignore[method-assign]
    log = History(place / "log.jsonl", [TensorBoard(place / "board")])
    atexit.register(log.close)

    def logged() -> None:
        _steps(whole, log)
        log.flush(whole.iteration)

    def error() -> float:
        logged()
        return float(read(place / "log.jsonl")[-1]["iteration"] != whole.iteration)

    silent = _silent(place / "none.jsonl")
    return [Candidate(WITHOUT, partial(_steps, bare, silent)), Candidate(WITH, logged, error)]


def _steps(trainer: Trainer, log: History) -> None:
    trainer.model.train()
    for _ in range(STEPS):
        trainer.step(log)


def _silent(path: Path) -> History:
    """Return a history that keeps nothing."""
    from diffmtl_fast.train.history import History

    class Silent(History):
        def add(self, *given: object) -> None:
            pass

        def add_gradient_norm(self, norm: object) -> None:
            pass

    return Silent(path)
