"""``diffmtl-fast study``."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any

from .._errors import UserError
from .._number_types import PositiveInt, Processes
from ..study import runner
from ..study.folder import StudyFolder
from ..study.plan import Plan, make_plan
from ..study.report import write_report
from ..train.config import read_values


def study(
    study_dir: str = "runs/study",
    config: str | None = None,
    iterations: PositiveInt | None = None,
    seeds: PositiveInt | None = None,
    evaluations: PositiveInt | None = None,
    jobs: Processes = 2,
    threads: Processes = 1,
    only: str = "*",
    methods: str = "papers",
    finalists: PositiveInt | None = None,
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
        only: do the work of matching names alone, such as vanilla-* or *-seed-0,calibration
        methods: papers, the methods of the papers; all, the others too, on log-SNR clusters; or names with commas
        finalists: after the first seed of all methods, go on with plain training and so many of the others, those
            that took the fewest steps to plain training's quality in it
        quick: a tiny study of a minute or two, to see that it works
        report_only: write the report of what is there, no more
        out: folder of the report; STUDY_DIR/report if not given
    """
    command = _command(locals())
    folder, report = StudyFolder(Path(study_dir)), None if out is None else Path(out)
    if report_only:
        print(f"wrote {write_report(folder, folder.report if report is None else report)}")
        return
    asked = (config, iterations, seeds, evaluations, quick, methods)
    if folder.plan.exists() and asked == (None, None, None, None, False, "papers"):
        plan = Plan.read(folder.plan)
    else:
        plan = make_plan(
            None if config is None else read_values(Path(config)),
            quick=quick,
            iterations=iterations,
            seeds=seeds,
            evaluations=evaluations,
            methods=methods,
        )
    how: dict[str, Any] = {"jobs": jobs, "threads": threads, "report": report, "command": command}
    if finalists is None:
        runner.study(plan, folder, only=only, **how)
    elif finalists < 1 or only != "*":
        raise UserError(f"finalists: expected at least 1 and no --only, found {finalists} with --only {only}")
    else:
        runner.study_finalists(plan, folder, finalists, **how)


def _command(options: dict[str, Any]) -> str:
    """The command line that these options come from, those left out that are as by default."""
    parameters, words = inspect.signature(study).parameters, ["diffmtl-fast", "study"]
    for name, value in options.items():
        if value != parameters[name].default:
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)
