"""The pieces of work of a study. Each continues where it was interrupted, and does nothing if it is complete."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._errors import UserError
from .._files import remove, write_json
from ..analysis import Judge
from ..clustering import cluster_timesteps
from ..run import analyses
from ..run.evaluation import build_judge
from ..run.experts import train_expert
from ..run.trained_denoiser import load
from ..run.training import train
from ..train import checkpoint
from ..train.components import build, build_scheduler, resolve_device
from ..train.config import Component, Evaluation
from ..train.folder import RunFolder
from .calibration import calibrate
from .folder import StudyFolder
from .plan import VANILLA, Plan, Variant

CALIBRATION_ROUNDS = 50


def measure_costs(study: StudyFolder, plan: Plan, rounds: int = CALIBRATION_ROUNDS) -> None:
    """Calibrate the cost of a step."""
    if not study.calibration.exists():
        write_json(study.calibration, calibrate(plan, rounds))


def train_and_evaluate(study: StudyFolder, plan: Plan, variant: Variant, seed: int) -> None:
    """Train a run, then evaluate its checkpoints; the recorded time is that of training alone.

    Only the last checkpoint is kept, except of plain training with the first seed: the task affinities are
    measured on all of its checkpoints.
    """
    if study.evaluations(variant, seed).exists():
        return
    run = study.run(variant, seed)
    train(plan.config(variant, seed, study.affinity.absolute()), run, resume=True, outputs=False)
    paths = checkpoint.checkpoints(run.checkpoints)
    found = evaluate_checkpoints(run, paths)
    study.evaluations(variant, seed).parent.mkdir(parents=True, exist_ok=True)
    write_json(study.evaluations(variant, seed), found)
    if (variant, seed) != (VANILLA, 0):
        for path in paths[:-1]:
            remove(path)


def measure_affinity(study: StudyFolder, plan: Plan) -> None:
    """Measure the task affinities of plain training."""
    if not study.affinity.exists():
        run = _plain_run(study, 0)
        analyses.affinity(str(run), device=plan.base.device, tasks=plan.tasks, samples=plan.samples)


def measure_disattenuated_affinity(study: StudyFolder, plan: Plan) -> None:
    """Measure the task affinities of plain training with more images, corrected for their noise."""
    if not study.disattenuated.exists():
        analyses.affinity(
            str(_plain_run(study, 0)),
            device=plan.base.device,
            tasks=plan.tasks,
            samples=plan.more_samples,
            disattenuate=True,
            seed=1,
        )


def train_one_expert(study: StudyFolder, plan: Plan, seed: int, index: int) -> None:
    """Train the expert of an interval, beside plain training with the same seed."""
    if study.gaps(seed).exists():
        return
    run = _plain_run(study, seed)
    config = run.read_config()
    clusters = cluster_timesteps(build_scheduler(config).config.num_train_timesteps, plan.intervals)
    first, end = clusters.boundaries[index : index + 2].tolist()
    run.analysis.mkdir(exist_ok=True)
    train_expert(run, config, first, end)


def measure_gaps(study: StudyFolder, plan: Plan, seed: int) -> None:
    """Measure negative transfer, and the difficulty of the intervals by the same experts."""
    if study.gaps(seed).exists():
        return
    run = str(_plain_run(study, seed))
    options: dict[str, Any] = {"device": plan.base.device, "intervals": plan.intervals}
    analyses.difficulty(run, **options)
    analyses.negative_transfer(run, **options, seed=seed)


def measure_early_gaps(study: StudyFolder, plan: Plan, seed: int, iteration: int) -> None:
    """Measure negative transfer by the same experts as they were at an iteration.

    Nothing is trained: the time goes into drawing the evaluation's pictures, once per interval and once without an
    expert.
    """
    if study.gaps(seed, iteration).exists():
        return
    analyses.negative_transfer(
        str(_plain_run(study, seed)),
        device=plan.base.device,
        intervals=plan.intervals,
        expert_iteration=iteration,
        seed=seed,
    )


def _plain_run(study: StudyFolder, seed: int) -> RunFolder:
    run = study.run(VANILLA, seed)
    if not study.evaluations(VANILLA, seed).exists():
        raise UserError(f"{run}: expected complete plain training to analyse, found none yet")
    return run


def evaluate_checkpoints(run: RunFolder, paths: list[Path]) -> list[dict[str, Any]]:
    """The metrics of a run's averaged weights at some of its checkpoints, with the training time until then."""
    config, found = run.read_config(), []
    judge = _judge(json.dumps([asdict(config.data), asdict(config.evaluation), config.device]))
    for path in paths:
        trained = load(run, config, path)
        labels = trained.labels_to_judge()
        pictures = trained.draw(labels, len(labels), config.seed)
        seconds = round(checkpoint.load_state(path)["seconds"], 3)
        found.append({"iteration": trained.iteration, "seconds": seconds, **judge.figures(pictures, labels)})
    return found


@functools.lru_cache(maxsize=1)
def _judge(told: str) -> Judge:
    """The judge of a data set, given as JSON of what it depends on; it takes seconds to train."""
    data, evaluation, device = json.loads(told)
    options = Evaluation(**{**evaluation, "features": Component(**evaluation["features"])})
    return build_judge(build("data", Component(**data)), options, resolve_device(device))
