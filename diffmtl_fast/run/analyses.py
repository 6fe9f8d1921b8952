"""The analyses of a run: its model, data and schedule put to `diffmtl_fast.analysis`.

The first three functions are the commands of ``diffmtl-fast analyze``, whose options are their arguments.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import UserError, blame
from .._files import remove, replacing, write_json
from .._number_types import PositiveFloat, PositiveInt, Seed, Size, UnitFloat
from ..analysis import (
    GaussianFit,
    NegativeTransfer,
    TaskAffinity,
    conditional_relative_entropy,
    convergence,
    gaussian_relative_entropy,
    plot_affinity,
    plot_convergence,
    plot_negative_transfer,
    plot_relative_entropy,
    task_affinity,
)
from ..analysis import negative_transfer as measure_negative_transfer
from ..clustering import IntervalClustering, cluster_timesteps
from ..clustering.continuous import in_timesteps
from ..data.items import Visits
from ..diffusion.training_noise import TrainingNoise
from ..train import history
from ..train.checkpoint import checkpoints, iteration, load_module, verify
from ..train.components import (
    Data,
    build_clusters,
    build_conditioning,
    build_data,
    build_model,
    build_noise,
    build_scheduler,
    denoise,
    prediction,
    resolve_device,
)
from ..train.config import IN_MEMORY, Clusters, Config, Loss
from ..train.folder import RunFolder
from .experts import expert_checkpoint, load_expert, train_expert
from .plots import LOG_SNR_DRAWN
from .titles import method_title
from .trained_denoiser import load


def affinity(
    run_dir: str,
    checkpoint: str | None = None,
    device: str = "auto",
    tasks: PositiveInt | None = None,
    strided: bool = False,
    samples: Size = 16,
    batch_size: Size = 128,
    projection: PositiveInt | None = None,
    disattenuate: bool = False,
    memory: PositiveFloat = 2.0,
    seed: Seed = 0,
) -> list[Path]:
    """Measure the task affinity: the cosine of the gradients of two timesteps, of all pairs.

    It is averaged over the run's checkpoints. The T x T matrix goes to affinity.npy, for --clusters.cost affinity,
    with a picture. An interrupted call goes on where it was if it is repeated.

    Args:
        run_dir: folder of the run
        checkpoint: name of the checkpoint to use, not all that the run keeps
        device: auto, cpu, cuda or cuda:N
        tasks: groups of consecutive timesteps; a task per timestep if not given
        strided: of every group, the middle timestep alone stands for it
        samples: images per task
        batch_size: most images per pass
        projection: random combinations kept per gradient, a power of two such as 4096; exact if not given
        disattenuate: correct the cosines for the noise of few images, which two halves of them tell; writes
            affinity-disattenuated.*
        memory: for gradients, in GiB
        seed: of images, noise and projection

    Returns:
        The files: the matrix, what it is of, and the picture, ``affinity`` or ``affinity-disattenuated``.

    Raises:
        UserError: the run has no intact checkpoint, or an argument is out of range.
    """
    run = RunFolder(run_dir)
    config = replace(run.read_config(), device=device)
    where, data = resolve_device(config.device), build_data(config)
    noise = build_noise(replace(config, loss=Loss()), build_scheduler(config), where)
    model = build_model(config, data, where).train()
    number = noise.num_timesteps
    with blame("tasks"):
        groups = cluster_timesteps(number, number if tasks is None else tasks)
    options: dict[str, Any] = {
        "strided": strided, "samples": samples, "batch_size": batch_size, "projection": projection, "seed": seed,
        **({"reliability": True} if disattenuate else {}),
    }  # fmt: skip
    found = checkpoints(run.checkpoints) if checkpoint is None else [run.checkpoint(checkpoint)]
    paths = [path for path in found if path is not None]
    if not paths:
        raise UserError(f"run folder {run}: expected a checkpoint, found none yet")
    for path in paths:
        verify(path)
    names = [path.name for path in paths]
    run.analysis.mkdir(exist_ok=True)
    unfinished = run.analysis / f"affinity-{_key(groups, names, **options)}"
    with blame("affinity", (ValueError,)):
        measured = task_affinity(
            model,
            denoising_loss(config, data, noise, where),
            groups,
            checkpoints={path.name: partial(load_module, path, "model") for path in paths},
            folder=unfinished,
            memory=int(memory * 2**30),
            progress=True,
            **options,
        )
    about = {"tasks": groups.k, "checkpoints": names, **options, "error_bound": measured.error_bound}
    title = f"{method_title(config)}: mean of {_iterations(paths)} iterations\n{samples} images per task"
    if measured.reliability is not None:
        about["reliability"] = measured.reliability.tolist()
        measured, title = measured.disattenuated, f"{title}, corrected for their noise"
    levels = noise.log_snr(LOG_SNR_DRAWN)
    written = _write(affinity_file(run, disattenuated=disattenuate), measured, about, levels, title)
    remove(unfinished)
    return written


def affinity_file(run: RunFolder, *, disattenuated: bool = False) -> Path:
    """Where the matrix of a run's task affinities lies."""
    return run.analysis / f"affinity{'-disattenuated' if disattenuated else ''}.npy"


def negative_transfer(
    run_dir: str,
    checkpoint: str | None = None,
    device: str = "auto",
    intervals: PositiveInt = 5,
    cost: Literal["timestep", "snr"] = "timestep",
    iterations: PositiveInt | None = None,
    expert_iteration: PositiveInt | None = None,
    num: Size | None = None,
    steps: Size | None = None,
    resamples: Size = 1000,
    seed: Seed = 0,
) -> list[Path]:
    """Measure the negative transfer gap of every interval of timesteps.

    That is the Fréchet distance of pictures that an expert, trained on the interval alone, denoises inside it and
    the run elsewhere, minus the run's own. Below 0 the other tasks' training does harm. Experts are trained where
    they are missing, and an interrupted call goes on where it was if it is repeated.

    Args:
        run_dir: folder of the run
        checkpoint: name of the checkpoint to use, not the newest
        device: auto, cpu, cuda or cuda:N
        intervals: number of intervals, an expert for each
        cost: what the intervals hold together; timestep: equal lengths
        iterations: of every expert; as many as the run's if not given
        expert_iteration: take the experts as they were after so many iterations, which they keep a checkpoint of;
            after the run's iterations over the number of intervals they had seen their timesteps as often as the
            run has. Writes negative-transfer-at-N
        num: pictures drawn with every model; the run's own if not given
        steps: denoising steps; the run's own if not given
        resamples: of the bootstrap, for the 95 % intervals
        seed: of the pictures' noise and of the bootstrap

    Returns:
        The files: the figures and the picture, ``negative-transfer`` or, of an earlier iteration,
        ``negative-transfer-at-ITERATION``.

    Raises:
        UserError: the run has no intact checkpoint or its data no labels, the experts keep none of the iteration,
            or an argument is out of range.
        TrainingDiverged: an expert's loss or weight is not finite.
    """
    run = RunFolder(run_dir)
    config = _with_steps(replace(run.read_config(), device=device), steps)
    trained = load(run, config, checkpoint)
    labels = trained.labels_to_judge(num)
    with blame("resamples"):
        if resamples < 1:
            raise ValueError(f"expected at least 1, found {resamples}")
    noise = build_noise(config, trained.scheduler)
    found = _intervals(Clusters(cost, intervals), noise)
    folders = _train_experts(run, config, found, iterations)
    chosen_experts = [
        None if expert_iteration is None else expert_checkpoint(folder, expert_iteration)
        for folder in folders
    ]
    judge = trained.judge()

    def sample(model: nn.Module) -> Tensor:
        return replace(trained, model=model).draw(labels, len(labels), seed)

    measured = measure_negative_transfer(
        trained.model,
        lambda j: load_expert(folders[j], device, chosen_experts[j]).model,
        found,
        sample,
        judge.features,
        judge.real,
        times=noise.model_times(found.boundaries),
        resamples=resamples,
        seed=seed,
        progress=True,
    )
    about = {
        "boundaries": found.boundaries.tolist(),
        "iterations": trained.iteration,
        "expert_iterations": expert_iteration or _iterations_of(config, iterations),
        "num_samples": len(labels), "sampling_steps": config.sampling.steps, "resamples": resamples, "seed": seed,
        **_gap_facts(measured),
    }  # fmt: skip
    facts = negative_transfer_file(run, expert_iteration)
    picture = facts.with_suffix(".png")
    write_json(facts, about)
    with replacing(picture) as aside:
        plot_negative_transfer(aside, measured, f"{trained.title}{_at(expert_iteration)}")
    return [facts, picture]


def negative_transfer_file(run: RunFolder, expert_iteration: int | None = None) -> Path:
    """Where the gaps of a run lie, with experts as they are at the end or were at an iteration."""
    at = "" if expert_iteration is None else f"-at-{expert_iteration}"
    return run.analysis / f"negative-transfer{at}.json"


def difficulty(
    run_dir: str,
    device: str = "auto",
    intervals: PositiveInt = 5,
    cost: Literal["timestep", "snr"] = "timestep",
    iterations: PositiveInt | None = None,
    fraction: UnitFloat = 0.9,
) -> list[Path]:
    """Measure the difficulty of the run's tasks in two ways.

    One is the convergence of experts, each trained on an interval of timesteps alone (the same as those of
    negative-transfer); the other is the relative entropy of neighbouring noise levels. Experts are trained where
    they are missing.

    Args:
        run_dir: folder of the run
        device: auto, cpu, cuda or cuda:N
        intervals: number of intervals, an expert for each
        cost: what the intervals hold together; timestep: equal lengths
        iterations: of every expert; as many as the run's if not given
        fraction: of the loss's fall, whose iterations are reported

    Returns:
        The files: the figures and the pictures.

    Raises:
        UserError: the schedule's log-SNR is not finite, or an argument is out of range.
        TrainingDiverged: an expert's loss or weight is not finite.
    """
    run = RunFolder(run_dir)
    config = replace(run.read_config(), device=device)
    data = build_data(config).images(IN_MEMORY)
    noise = build_noise(config, build_scheduler(config))
    with blame("fraction"):
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"expected a number between 0 and 1, found {fraction}")
    with blame("scheduler"):
        levels = noise.log_snr()
        curves = {
            "of one image (conditional)": conditional_relative_entropy(
                levels, float(data.train.double().square().mean())
            ),
            "of a Gaussian fit of the images": gaussian_relative_entropy(levels, GaussianFit.of(data.train)),
        }
    found = _intervals(Clusters(cost, intervals), noise)
    folders = _train_experts(run, config, found, iterations)
    logs = [history.read(folder.log) for folder in folders]
    with blame("iterations"):
        measured = convergence(
            found,
            np.array([line["iteration"] for line in logs[0]]),
            np.array([[line["loss"] for line in log] for log in logs]),
            fraction=fraction,
        )
    facts, convergences, entropies = (
        run.analysis / name for name in ("difficulty.json", "convergence.png", "relative-entropy.png")
    )
    about = {
        "boundaries": found.boundaries.tolist(),
        "expert_iterations": _iterations_of(config, iterations),
        "fraction": fraction,
        "steps_to_fraction": [None if np.isnan(steps) else float(steps) for steps in measured.steps_to],
        "relative_entropy": {name: values.tolist() for name, values in curves.items()},
    }
    write_json(facts, about)
    with replacing(convergences) as aside:
        plot_convergence(
            aside, measured, f"{_iterations_of(config, iterations):,} iterations on each interval"
        )
    with replacing(entropies) as aside:
        plot_relative_entropy(aside, curves, levels, "Relative entropy of neighbouring noise levels")
    return [facts, convergences, entropies]


def denoising_loss(
    config: Config, data: Data, noise: TrainingNoise, device: torch.device
) -> Callable[[Callable[..., Any], Tensor, torch.Generator], Tensor]:
    """The losses of training images drawn at random, with fresh noise, at given timesteps: a `TimestepLoss`."""
    process = noise.process
    conditioning = build_conditioning(config, data, device)

    def loss(model: Callable[..., Any], t: Tensor, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data.training), t.shape, generator=generator, device=device)
        batch = Visits(data.training, None).__getitems__(index.tolist()).to(device)
        clean, arguments = batch.x, conditioning.arguments(batch.conditioning)
        drawn, level = torch.randn(clean.shape, generator=generator, device=device), noise.at(t)
        output = denoise(model, *process.inputs(process.noisy(clean, drawn, level), level), arguments)
        return process.loss(prediction(output), clean, drawn, level)

    return loss


def _key(groups: IntervalClustering, names: list[str], **options: Any) -> str:
    """Names the folder of an unfinished measurement, so that only the same one continues it."""
    text = json.dumps([groups.boundaries.tolist(), names, options])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _iterations(paths: list[Path]) -> str:
    return ", ".join(f"{iteration(path):,}" for path in paths)


def _write(
    matrix: Path, measured: TaskAffinity, about: dict[str, Any], levels: np.ndarray, title: str
) -> list[Path]:
    facts, picture = (matrix.with_suffix(suffix) for suffix in (".json", ".png"))
    measured.save(matrix)
    write_json(facts, about)
    with replacing(picture) as aside:
        plot_affinity(aside, measured, levels, title)
    return [matrix, facts, picture]


def _with_steps(config: Config, steps: int | None) -> Config:
    if steps is None:
        return config
    if steps < 1:
        raise UserError(f"steps: expected at least 1, found {steps}")
    return replace(config, sampling=replace(config.sampling, steps=steps))


def _intervals(clusters: Clusters, noise: TrainingNoise) -> IntervalClustering:
    number = noise.num_timesteps
    found = build_clusters(clusters, noise.log_snr, number, "intervals", noise.distribution)
    return in_timesteps(found, number)


def _train_experts(
    run: RunFolder, config: Config, intervals: IntervalClustering, iterations: int | None
) -> list[RunFolder]:
    if iterations is not None and iterations < 1:
        raise UserError(f"iterations: expected at least 1, found {iterations}")
    run.analysis.mkdir(exist_ok=True)
    bounds = itertools.pairwise(intervals.boundaries.tolist())
    return [train_expert(run, config, first, end, iterations) for first, end in bounds]


def _iterations_of(config: Config, iterations: int | None) -> int:
    return config.iterations if iterations is None else iterations


def _at(expert_iteration: int | None) -> str:
    return "" if expert_iteration is None else f"; experts at {expert_iteration:,}"


def _gap_facts(measured: NegativeTransfer) -> dict[str, Any]:
    return {
        "frechet_distance": measured.multitask,
        "switched_frechet_distance": measured.switched.tolist(),
        "gaps": measured.gaps.tolist(),
        "low": measured.low.tolist(),
        "high": measured.high.tolist(),
        "confidence": measured.confidence,
    }
