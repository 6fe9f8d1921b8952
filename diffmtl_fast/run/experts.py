"""Experts of a run: models like its own, each trained on one interval of timesteps alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .._errors import UserError
from ..train import checkpoint
from ..train.config import PLAIN, Clusters, Config, Curriculum, Timesteps
from ..train.folder import RunFolder
from .trained_denoiser import TrainedDenoiser, load_run
from .training import train


def expert_config(config: Config, first: int, end: int, iterations: int | None = None) -> Config:
    """The configuration of an expert: plain training on the interval, everything else as in the run.

    Args:
        config: of the run.
        first: the interval's first timestep.
        end: one past its last.
        iterations: as many as the run's by default.
    """
    return replace(
        config,
        method=PLAIN,
        iterations=config.iterations if iterations is None else iterations,
        clusters=Clusters(cost="timestep", k=1),
        curriculum=Curriculum(),
        timesteps=Timesteps(interval=[first, end]),
        # Every iteration, for the loss falls within a few dozen of them.
        logging=replace(config.logging, every=1, cosines_every=0, tensorboard=False),
    )


def expert_folder(run: RunFolder, first: int, end: int) -> RunFolder:
    """Where the expert of an interval is trained: a run of its own in the analyses of the run."""
    return RunFolder(run.analysis / "experts" / f"{first:04d}-{end - 1:04d}")


def train_expert(
    run: RunFolder, config: Config, first: int, end: int, iterations: int | None = None
) -> RunFolder:
    """Train the expert of an interval, or what is missing of it.

    Args:
        run: the run.
        config: its configuration, with the device to train on.
        first: see `expert_config`.
        end: see there.
        iterations: see there.

    Raises:
        UserError: the interval or the number of iterations cannot be used.
        TrainingDiverged: a loss or a weight is not finite.
    """
    folder = expert_folder(run, first, end)
    train(expert_config(config, first, end, iterations), folder, resume=True, outputs=False)
    return folder


def load_expert(folder: RunFolder, device: str, chosen: Path | None = None) -> TrainedDenoiser:
    """The averaged weights of a trained expert, at a checkpoint other than the newest if one is chosen."""
    return load_run(folder.path, chosen, device)


def expert_checkpoint(folder: RunFolder, iteration: int) -> Path:
    """The checkpoint that an expert keeps of an iteration.

    Raises:
        UserError: it keeps none.
    """
    kept = {checkpoint.iteration(path): path for path in checkpoint.checkpoints(folder.checkpoints)}
    if iteration not in kept:
        raise UserError(
            f"expert_iteration: expected one that {folder} keeps a checkpoint of "
            f"({', '.join(map(str, kept))}), found {iteration}"
        )
    return kept[iteration]
