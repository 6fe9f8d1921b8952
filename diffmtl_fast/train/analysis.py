"""The analyses of a run: its model, data and schedule put to `diffmtl_fast.analysis`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from .._files import remove, replacing
from ..analysis import TaskAffinity, plot_affinity, task_affinity
from ..clustering import IntervalClustering, cluster_timesteps
from ..diffusion import log_snr
from . import checkpoint
from .components import (
    build_data,
    build_model,
    build_scheduler,
    condition,
    denoising_target,
    prediction,
    resolve_device,
)
from .data import ImageData
from .errors import UserError, blame
from .folder import RunFolder
from .run import LOG_SNR_DRAWN
from .trained import method_title


def affinity(
    run: RunFolder,
    device: str = "auto",
    chosen: Path | None = None,
    *,
    tasks: int | None = None,
    strided: bool = False,
    samples: int = 16,
    batch_size: int = 128,
    projection: int | None = None,
    memory: int = 2 * 2**30,
    seed: int = 0,
) -> list[Path]:
    """Measure the task affinities of a run's raw weights, in training mode, as the paper's public script does.

    Args:
        run: the run.
        device: auto, cpu, cuda or cuda:N.
        chosen: the checkpoint; by default the mean is over all that there are.
        tasks: number of groups of timesteps; T by default.
        strided: see `task_affinity`, as for the rest.
        samples: see there.
        batch_size: see there.
        projection: see there.
        memory: see there.
        seed: see there.

    Returns:
        The files: the matrix, what it is of, and the picture.

    Raises:
        UserError: the run has no intact checkpoint, or an argument is out of range.
    """
    config = replace(run.read_config(), device=device)
    where, data, scheduler = resolve_device(config.device), build_data(config), build_scheduler(config)
    model = build_model(config, data, where).train()
    number = scheduler.config.num_train_timesteps
    with blame("tasks"):
        groups = cluster_timesteps(number, number if tasks is None else tasks)
    options: dict[str, Any] = {
        "strided": strided, "samples": samples, "batch_size": batch_size, "projection": projection, "seed": seed,
    }  # fmt: skip
    found = [run.checkpoint(chosen)] if chosen is not None else checkpoint.checkpoints(run.checkpoints)
    paths = [path for path in found if path is not None]
    if not paths:
        raise UserError(f"run folder {run}: expected a checkpoint, found none yet")
    for path in paths:
        checkpoint.verify(path)
    names = [path.name for path in paths]
    run.analysis.mkdir(exist_ok=True)
    unfinished = run.analysis / f"affinity-{_key(groups, names, **options)}"
    with blame("affinity", (ValueError,)):
        measured = task_affinity(
            model,
            denoising_loss(data, scheduler, where),
            groups,
            checkpoints={path.name: partial(_load_weights, path) for path in paths},
            folder=unfinished,
            memory=memory,
            progress=True,
            **options,
        )
    about = {"tasks": groups.k, "checkpoints": names, **options, "error_bound": measured.error_bound}
    title = f"{method_title(config)}: mean of {_iterations(paths)} iterations, {samples} images per task"
    levels = log_snr(scheduler, clip=LOG_SNR_DRAWN)
    written = _write(run.analysis, measured, about, levels, title)
    remove(unfinished)
    return written


def denoising_loss(
    data: ImageData, scheduler: Any, device: torch.device
) -> Callable[[Callable[..., Any], Tensor, torch.Generator], Tensor]:
    """The losses of training images drawn at random, with fresh noise, at given timesteps: a `TimestepLoss`."""
    images = data.train.to(device)
    labels = None if data.train_labels is None else data.train_labels.to(device)

    def loss(model: Callable[..., Any], t: Tensor, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), t.shape, generator=generator, device=device)
        clean, classes = images[index], None if labels is None else labels[index]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        output = model(scheduler.add_noise(clean, noise, t), t, **condition(classes))
        return ops.sample_mse(prediction(output), denoising_target(scheduler, clean, noise, t))

    return loss


def _load_weights(path: Path, model: nn.Module) -> None:
    checkpoint.load_module(path, "model", model)


def _key(groups: IntervalClustering, names: list[str], **options: Any) -> str:
    """Names the folder of an unfinished measurement, so that only the same one continues it."""
    text = json.dumps([groups.boundaries.tolist(), names, options])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _iterations(paths: list[Path]) -> str:
    return ", ".join(f"{checkpoint.iteration(path):,}" for path in paths)


def _write(
    folder: Path, measured: TaskAffinity, about: dict[str, Any], levels: np.ndarray, title: str
) -> list[Path]:
    matrix, facts, picture = (folder / f"affinity.{suffix}" for suffix in ("npy", "json", "png"))
    measured.save(matrix)
    with replacing(facts) as aside:
        aside.write_text(json.dumps(about, indent=2) + "\n")
    with replacing(picture) as aside:
        plot_affinity(aside, measured, levels, title)
    return [matrix, facts, picture]
