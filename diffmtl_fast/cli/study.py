"""``diffmtl-fast study``."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any

from .runs import path_of


def study(
    study_dir: str = "runs/study",
    config: str | None = None,
    iterations: int | None = None,
    seeds: int | None = None,
    evaluations: int | None = None,
    jobs: int = 2,
    threads: int = 1,
    only: str = "*",
    quick: bool = False,
    report_only: bool = False,
    out: str | None = None,
) -> None:
    """Train every method on every clustering, and report what they gain.

    The methods are plain diffusion, those of the papers on timestep, log-SNR and affinity clusters, the curriculum
    and its reverse, each with several seeds. Negative transfer and the cost of every method's step are measured
    too; the report has tables, convergence curves and verdicts. Runs are independent: repeated, the command does
    what is missing.

    Args:
        study_dir: folder of the study
        config: YAML file with the options of `train` that all runs share (see `train --print_config`); the bundled
            study's if not given
        iterations: of every run; the configuration's if not given
        seeds: number of seeds; 3 if not given
        evaluations: of every run, evenly spaced; 7 if not given
        jobs: runs at a time
        threads: CPU threads of each
        only: do the work of matching names alone, such as vanilla-* or *-seed-0
        quick: a tiny study of a minute or two, to see that it works
        report_only: write the report of what is there, no more
        out: folder of the report; STUDY_DIR/report if not given
    """
    command = _command(locals())
    from ..study import runner
    from ..study.folder import StudyFolder
    from ..study.plan import Plan, make_plan
    from ..study.report import write_report
    from ..train.config import read_values

    folder, report = StudyFolder(Path(study_dir)), path_of(out)
    if report_only:
        print(f"wrote {write_report(folder, folder.report if report is None else report)}")
        return
    if folder.plan.exists() and (config, iterations, seeds, evaluations, quick) == (None,) * 4 + (False,):
        plan = Plan.read(folder.plan)
    else:
        plan = make_plan(
            None if config is None else read_values(Path(config)),
            quick=quick,
            iterations=iterations,
            seeds=seeds,
            evaluations=evaluations,
        )
    runner.study(plan, folder, jobs=jobs, threads=threads, only=only, report=report, command=command)


def _command(options: dict[str, Any]) -> str:
    """The command line that these options come from, those left out that are as by default."""
    parameters, words = inspect.signature(study).parameters, ["diffmtl-fast", "study"]
    for name, value in options.items():
        if value != parameters[name].default:
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)
