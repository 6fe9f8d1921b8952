"""A step of the bundled trainer, with its data, averages and log, beside a step of the loop of the README.

Both train the same UNet on the digits; each passes its gate if its first steps lower the loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diffmtl_fast as dm
from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Candidate
from benchmarks.names import OURS, TYPICAL_K, Group
from diffmtl_fast._extras import require
from diffmtl_fast.diffusion import log_snr

LOOP = "loop of the README"
TRAINER = f"{OURS}, bundled trainer"
METHODS: dict[str, Callable[[], Any]] = {
    "uw": lambda: dm.UncertaintyWeighting(TYPICAL_K),
    "pcgrad": dm.PCGrad,
}
# Of the gate.
FIRST_STEPS = 6


def benchmarks(options: Options) -> list[Benchmark]:
    """Return a case for each of two methods."""
    return [_benchmark(options, method) for method in METHODS]


def _benchmark(options: Options, method: str) -> Benchmark:
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
        options.pick(1, 30),
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
