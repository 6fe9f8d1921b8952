"""Runs what a study is missing, several runs at a time, each in the same few threads."""

from __future__ import annotations

import contextlib
import fnmatch
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._errors import TrainingDiverged, UserError
from . import journal, results, work
from .folder import StudyFolder, all_runs, run_name
from .plan import VANILLA, Plan
from .report import write_report


@dataclass(frozen=True)
class Job:
    """A piece of work for a process of the pool.

    Attributes:
        name: for messages and the file of its output.
        work: does it.
        done: what exists once it is done.
    """

    name: str
    work: Callable[[], None]
    done: Path


def study(
    plan: Plan,
    folder: StudyFolder,
    *,
    jobs: int = 2,
    threads: int = 1,
    only: str = "*",
    report: Path | None = None,
    command: str | None = None,
) -> None:
    """Do what is missing of a study, then write its report.

    Runs are independent of each other and of the order. One that was interrupted goes on from its last
    checkpoint, one that is complete is skipped; one that diverges is left out of the report.

    Args:
        plan: what to do. The plan of a study that was begun has to be the same.
        folder: where.
        jobs: runs at a time.
        threads: of each.
        only: do the work whose name matches this pattern alone, or one of several with commas between them, for
            example ``vanilla-*``.
        report: folder of the report; by default the study's own.
        command: that this was asked for by, to be named in the report.

    Raises:
        UserError: the study was begun with another plan, or some of the work failed.
    """
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value < 1:
            raise UserError(f"{name}: expected at least 1, found {value}")
    if folder.plan.exists():
        plan.check_same(Plan.read(folder.plan))
    else:
        folder.path.mkdir(parents=True, exist_ok=True)
        plan.save(folder.plan)
    folder.output.mkdir(exist_ok=True)
    failed: dict[str, str] = {}
    stages = _stages(folder, plan)
    total = sum(_selected(job, only) for stage in stages for job in stage)
    if total:
        if command is not None:
            journal.add_command(folder.journal, command)
        progress = _Progress(total, jobs)
        with _pool(jobs, threads) as pool:
            for stage in stages:
                todo = [job for job in stage if _selected(job, only)]
                failed |= _run(pool, todo, folder, progress)
    if any(folder.evaluations(VANILLA, seed).exists() for seed in range(plan.seeds)):
        print(f"wrote {write_report(folder, folder.report if report is None else report)}")
    else:
        print("no report yet: it compares with plain training, which is not complete")
    if failed:
        raise UserError("; ".join(f"{name} failed: {message}" for name, message in failed.items()))


def study_finalists(plan: Plan, folder: StudyFolder, count: int, **how: Any) -> None:
    """Try all methods with their first seed, then go on with plain training and the best of the others.

    Args:
        plan: see `study`.
        folder: see there.
        count: of the others, those that took the fewest steps to plain training's quality.
        **how: the other arguments of `study`, without `only`.

    Raises:
        UserError: see there.
    """
    first = [
        f"{variant.name}-seed-0" for variant in plan.variants if variant.family in ("baseline", "others")
    ]
    try:
        study(plan, folder, only=",".join(["calibration", *first]), **how)
    except UserError as error:  # a method that diverges is out
        print(error)
    chosen = results.load_results(folder).promising(count)
    print(f"finalists: {', '.join(variant.name for variant in chosen)}")
    study(plan, folder, only=",".join(f"{variant.name}-seed-*" for variant in (VANILLA, *chosen)), **how)


def _stages(folder: StudyFolder, plan: Plan) -> list[list[Job]]:
    """The jobs by stage: each needs results of earlier stages only, so those of a stage may run in any order."""
    runs = all_runs(plan)

    def run_jobs(*, by_affinity: bool) -> list[Job]:
        return [
            Job(
                run_name(variant, seed),
                partial(work.train_and_evaluate, folder, plan, variant, seed),
                folder.evaluations(variant, seed),
            )
            for variant, seed in runs
            if (variant.cost == "affinity") == by_affinity
        ]

    seeds = range(plan.seeds)
    affinity = Job("affinity", partial(work.measure_affinity, folder, plan), folder.affinity)
    disattenuated = Job(
        "affinity-disattenuated",
        partial(work.measure_disattenuated_affinity, folder, plan),
        folder.disattenuated,
    )
    experts = [
        Job(
            f"expert-{index}-seed-{seed}",
            partial(work.train_one_expert, folder, plan, seed, index),
            folder.gaps(seed),
        )
        for seed in seeds
        for index in range(plan.intervals)
    ]
    gaps = [
        Job(f"gaps-seed-{seed}", partial(work.measure_gaps, folder, plan, seed), folder.gaps(seed))
        for seed in seeds
    ]
    early_gaps = [
        Job(
            f"gaps-at-{iteration}-seed-{seed}",
            partial(work.measure_early_gaps, folder, plan, seed, iteration),
            folder.gaps(seed, iteration),
        )
        for seed in seeds
        for iteration in plan.exposures
    ]
    calibration = Job("calibration", partial(work.measure_costs, folder, plan), folder.calibration)
    return [
        [calibration],
        run_jobs(by_affinity=False),
        [affinity, *experts],
        [*run_jobs(by_affinity=True), *gaps, *early_gaps, disattenuated],
    ]


def _selected(job: Job, only: str) -> bool:
    wanted = any(fnmatch.fnmatchcase(job.name, pattern) for pattern in only.split(","))
    return wanted and not job.done.exists()


def _run(pool: Executor, todo: list[Job], folder: StudyFolder, progress: _Progress) -> dict[str, str]:
    """Do some work; the messages of what failed for a reason that the user can put right, by name."""
    failed: dict[str, str] = {}
    begun = {pool.submit(_work, job, folder.output / f"{job.name}.txt"): job for job in todo}
    try:
        for future in as_completed(begun):
            job = begun[future]
            since, seconds, error = future.result()
            progress.tell(job.name, seconds, failed=error is not None)
            if error is None:
                journal.add_work(folder.journal, job.name, since, seconds)
            else:
                failed[job.name] = error
    finally:
        for future in begun:  # after a defect or Ctrl-C nothing more is begun
            future.cancel()
    return failed


def _pool(jobs: int, threads: int) -> Executor:
    # A forked process would take over torch's thread pool, but not the threads in it.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_set_threads, initargs=(threads,))


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _work(job: Job, output: Path) -> tuple[float, float, str | None]:
    """Do a job in a process of the pool; what it prints goes to a file.

    Returns:
        When it began, the seconds that it took, and what went wrong if the user can put it right.
    """
    since, begun, failed = time.time(), time.perf_counter(), None
    with output.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            job.work()
        except (UserError, TrainingDiverged) as error:
            failed = str(error)
    return since, time.perf_counter() - begun, failed


class _Progress:
    """A line for every piece of work that is done."""

    def __init__(self, total: int, jobs: int) -> None:
        self._total, self._jobs, self._begun = total, jobs, time.monotonic()
        self._seconds: list[float] = []

    def tell(self, name: str, seconds: float, failed: bool) -> None:
        self._seconds.append(seconds)
        done = len(self._seconds)
        left = sum(self._seconds) / done * (self._total - done) / self._jobs / 60
        so_far = (time.monotonic() - self._begun) / 60
        count = f"{done:>{len(str(self._total))}}/{self._total}"
        outcome = "failed after " if failed else ""
        print(
            f"{count}  {name}: {outcome}{seconds:.0f} s, {so_far:.1f} min so far, about {left:.0f} to go",
            flush=True,
        )
