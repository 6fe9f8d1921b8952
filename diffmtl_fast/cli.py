"""The command line: ``diffmtl-fast train | sample | evaluate | cluster | analyze | study | bench``.

Parsing needs jsonargparse alone; diffusers, scikit-learn and matplotlib load when a command needs them.
What the user can put right is reported as one line on standard error, with exit status 2; training that diverges
likewise, with exit status 1, which is also that of `bench compare` after a regression. Anything else is a defect
and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from . import __version__
from ._extras import require
from .diffusion.schedules import SCHEDULES, named_log_snr
from .train.errors import TrainingDiverged, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .bench import Results
    from .train.trained_denoiser import TrainedDenoiser

# A command's name to what makes its parser, and what it is for.
_Subcommands: TypeAlias = "dict[str, tuple[Callable[[Any], Any], str]]"

DIVERGED, REGRESSED, USAGE, INTERRUPTED = 1, 1, 2, 130
# The machine's fault or the path's, not the program's.
FILE_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.

    Returns:
        The exit status.
    """
    try:
        jsonargparse = require("jsonargparse", "train")
    except ImportError as error:
        return _fail(str(error))
    try:
        options = _parse(jsonargparse, _underscored(sys.argv[1:] if arguments is None else arguments))
        command = options.command
        status = _COMMANDS[command](options[command])
    except UnicodeDecodeError as error:
        return _fail(f"config: expected text in UTF-8 ({error})")
    except jsonargparse.ArgumentError as error:
        return _fail(_readable(str(error)))
    except UserError as error:
        return _fail(str(error))
    except TrainingDiverged as error:
        return _fail(str(error), DIVERGED)
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        return _fail(f"{error.filename or 'file'}: {error.strerror}")
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return status or 0


def _parse(jsonargparse: Any, arguments: list[str]) -> Any:
    """The options; those that resume a run have its own as defaults, not the bundled ones."""
    options = _parser(jsonargparse).parse_args(arguments)
    if options.command == "train" and options.train.resume:
        from .train.config import to_dict
        from .train.folder import RunFolder

        run = RunFolder(Path(options.train.run_dir))
        if run.begun:
            options = _parser(jsonargparse, to_dict(run.read_config())).parse_args(arguments)
    return options


def _underscored(arguments: Sequence[str]) -> list[str]:
    """Let every option be spelt with hyphens too; the names with underscores are those in YAML."""

    def spell(argument: str) -> str:
        name, sign, value = argument.partition("=")
        return name[:2] + name[2:].replace("-", "_") + sign + value if name.startswith("--") else argument

    return [spell(argument) for argument in arguments]


def _fail(message: str, status: int = USAGE) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


def _readable(message: str) -> str:
    """Rewrite jsonargparse's message in the form of the others: option, what was expected, what was found."""
    message = re.sub(r'^Parser key "([^"]+)":\s*', r"\1: ", message)
    union = re.search(r"Does not validate .* Union subtypes.*Given value: (.*)$", message, re.DOTALL)
    if union is not None:
        kinds = [
            kind
            for pair in re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]|(list\[\w+\])", _subtypes(message))
            for kind in pair
        ]
        choices = " or ".join("null" if kind == "NoneType" else kind for kind in kinds if kind)
        return f"{message[: union.start()]}expected {choices}, found {union[1]}"
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", message)
    message = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", message)
    return re.sub(r"\. Got value: (.*)$", r", found \1", message)


def _subtypes(message: str) -> str:
    return message.partition("Subtypes: ")[2].partition("\n")[0]


def _parser(jsonargparse: Any, training: dict[str, Any] | None = None) -> Any:
    """The parser of all commands; ``training`` are defaults of `train`, by default the bundled ones."""
    parser = jsonargparse.ArgumentParser(
        prog="diffmtl-fast",
        description="Train diffusion models as multi-task learning over noise levels. "
        "Options may be spelt with hyphens or underscores.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffmtl-fast {__version__}")
    commands = parser.add_subcommands(dest="command", help="one of these; each has its own --help")
    for name, (make, text) in {
        "train": (_train_parser, "train a model; write weights, pictures and metrics"),
        "sample": (_sample_parser, "draw pictures from a run"),
        "evaluate": (_evaluate_parser, "measure how close a run's pictures come to real ones"),
        "cluster": (_cluster_parser, "group the timesteps of a noise schedule"),
        "analyze": (_analyze_parser, "measure how the denoising tasks of a run agree and differ"),
        "study": (_study_parser, "train every method and clustering, and report what they gain"),
        "bench": (_bench_parser, "read what the benchmark suite measured"),
    }.items():
        more = (training,) if name == "train" else ()
        command = make(jsonargparse, *more)
        commands.add_subcommand(name, command, help=text)
        if name == "analyze":
            _add_analyses(jsonargparse, command)  # jsonargparse wants the outer level added first
        if name == "bench":
            _add_bench_commands(jsonargparse, command)
    return parser


def _train_parser(jsonargparse: Any, defaults: dict[str, Any] | None = None) -> Any:
    from .train import config

    parser = _subparser(
        jsonargparse,
        "train",
        "Train a model. What is not given is as in the run that --resume continues, or else as in the bundled run "
        "on digits.",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with options; those on the command line win"
    )
    parser.add_argument("--run_dir", default="runs/digits", help="folder of the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the folder; start one if there is none. Without it an existing run is refused",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="checkpoint to continue from, not the newest; newer ones are deleted",
    )
    parser.add_class_arguments(config.Config)
    parser.set_defaults(config.digits() if defaults is None else defaults)
    for action in parser._actions:
        if action.help == "Path to a configuration file.":
            action.help = argparse.SUPPRESS  # a file per group of options; --config is enough
    return parser


def _sample_parser(jsonargparse: Any) -> Any:
    parser = _subparser(jsonargparse, "sample", "Draw pictures with the averaged (EMA) weights of a run.")
    _add_run_arguments(parser)
    parser.add_argument("--num", type=int, default=64, help="number of pictures")
    parser.add_argument("--label", type=int, help="class to draw; all in turn if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int, help="denoising steps; the run's own if not given")
    parser.add_argument(
        "--out",
        default="samples.png",
        help=".png for a grid, .npy for float32 [N, C, H, W] in [-1, 1]",
    )
    return parser


def _evaluate_parser(jsonargparse: Any) -> Any:
    parser = _subparser(
        jsonargparse,
        "evaluate",
        "Compare a run's pictures with real ones: Fréchet distance, precision and recall, class agreement. "
        "Beside them the same for real test images (floor) and for noise (ceiling).",
    )
    _add_run_arguments(parser)
    parser.add_argument("--num", type=int, help="number of pictures; the run's own if not given")
    parser.add_argument("--steps", type=int, help="denoising steps; the run's own if not given")
    parser.add_argument(
        "--out",
        help="JSON file to write; RUN_DIR/metrics.json if no option above changes what the run measured",
    )
    return parser


def _cluster_parser(jsonargparse: Any) -> Any:
    parser = _subparser(
        jsonargparse,
        "cluster",
        "Group the timesteps of a noise schedule into intervals of least cost.",
    )
    parser.add_argument(
        "--scheduler",
        default=SCHEDULES[0],
        help=f"{', '.join(SCHEDULES)}, or a .npy or .json file of log-SNR [T]",
    )
    parser.add_argument("--timesteps", type=int, default=1000, help="T of a named schedule")
    parser.add_argument(
        "--k", type=str, default="5", help="number of clusters, or auto: chosen from the cost curve"
    )
    parser.add_argument("--k_max", type=int, help="most clusters that auto considers; 20 if not given")
    parser.add_argument(
        "--cost",
        choices=("snr", "squared", "timestep", "affinity"),
        default="snr",
        help="what the clusters hold together: log-SNR (absolute or squared deviation), timestep or task affinity",
    )
    parser.add_argument(
        "--affinity", help=".npy or .json file with the T x T task affinities, for cost affinity"
    )
    parser.add_argument("--min_size", type=int, help="fewest timesteps of a cluster")
    parser.add_argument("--max_size", type=int, help="most timesteps of a cluster")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--plot", help="picture file of the clusters, with --k auto of the cost curve too")
    return parser


def _analyze_parser(jsonargparse: Any) -> Any:
    about = "Measure how the denoising tasks of a run agree and differ; writes to RUN_DIR/analysis."
    return _subparser(jsonargparse, "analyze", about)


def _add_analyses(jsonargparse: Any, parser: Any) -> None:
    commands: _Subcommands = {
        "affinity": (_affinity_parser, "cosines between the gradients of all pairs of timesteps"),
        "negative-transfer": (
            _negative_transfer_parser,
            "what experts of an interval do better than the run",
        ),
        "difficulty": (
            _difficulty_parser,
            "how fast each interval is learned, and how far apart its levels lie",
        ),
    }
    _add_subcommands(jsonargparse, parser, "analysis", commands)


def _affinity_parser(jsonargparse: Any) -> Any:
    parser = _subparser(
        jsonargparse,
        "analyze affinity",
        "Measure the task affinity: the cosine of the gradients of two timesteps, of all pairs, averaged over the "
        "run's checkpoints. The T x T matrix goes to affinity.npy, for --clusters.cost affinity, with a picture. "
        "An interrupted call goes on where it was if it is repeated.",
    )
    _add_run_arguments(parser, "checkpoint to use, not all that the run keeps")
    parser.add_argument(
        "--tasks", type=int, help="groups of consecutive timesteps; a task per timestep if not given"
    )
    parser.add_argument(
        "--strided", action="store_true", help="of every group, the middle timestep alone stands for it"
    )
    parser.add_argument("--samples", type=int, default=16, help="images per task")
    parser.add_argument("--batch_size", type=int, default=128, help="most images per pass")
    parser.add_argument(
        "--projection",
        type=int,
        help="random combinations kept per gradient, a power of two such as 4096; exact if not given",
    )
    parser.add_argument(
        "--disattenuate",
        action="store_true",
        help="correct the cosines for the noise of few images, which two halves of them tell; writes "
        "affinity-disattenuated.*",
    )
    parser.add_argument("--memory", type=float, default=2.0, help="for gradients, in GiB")
    parser.add_argument("--seed", type=int, default=0, help="of images, noise and projection")
    return parser


def _negative_transfer_parser(jsonargparse: Any) -> Any:
    parser = _subparser(
        jsonargparse,
        "analyze negative-transfer",
        "Measure the negative transfer gap of every interval of timesteps: the Fréchet distance of pictures that "
        "an expert, trained on the interval alone, denoises inside it and the run elsewhere, minus the run's own. "
        "Below 0 the other tasks' training does harm. Experts are trained where they are missing, and an "
        "interrupted call goes on where it was if it is repeated.",
    )
    _add_run_arguments(parser)
    _add_expert_arguments(parser)
    parser.add_argument(
        "--expert_iteration",
        type=int,
        help="take the experts as they were after so many iterations, which they keep a checkpoint of; after the "
        "run's iterations over the number of intervals they had seen their timesteps as often as the run has. "
        "Writes negative-transfer-at-N",
    )
    parser.add_argument("--num", type=int, help="pictures drawn with every model; the run's own if not given")
    parser.add_argument("--steps", type=int, help="denoising steps; the run's own if not given")
    parser.add_argument(
        "--resamples", type=int, default=1000, help="of the bootstrap, for the 95 % intervals"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' noise and of the bootstrap")
    return parser


def _difficulty_parser(jsonargparse: Any) -> Any:
    parser = _subparser(
        jsonargparse,
        "analyze difficulty",
        "Measure the difficulty of the run's tasks in two ways: the convergence of experts, each trained on an "
        "interval of timesteps alone (the same as those of negative-transfer), and the relative entropy of "
        "neighbouring noise levels. Experts are trained where they are missing.",
    )
    _add_run_arguments(parser, None)
    _add_expert_arguments(parser)
    parser.add_argument(
        "--fraction", type=float, default=0.9, help="of the loss's fall, whose iterations are reported"
    )
    return parser


def _study_parser(jsonargparse: Any) -> Any:
    parser = _subparser(
        jsonargparse,
        "study",
        "Train plain diffusion, UW, PCGrad and NashMTL on timestep, log-SNR and affinity clusters, the curriculum "
        "and its reverse, with several seeds; measure negative transfer and the cost of every method's step; "
        "write a report with tables, convergence curves and verdicts. Runs are independent: repeated, the command "
        "does what is missing.",
    )
    parser.add_argument("--study_dir", default="runs/study", help="folder of the study")
    parser.add_argument(
        "--config",
        help="YAML file with the options of `train` that all runs share (see `train --print_config`); the bundled "
        "study's if not given",
    )
    parser.add_argument("--iterations", type=int, help="of every run; the configuration's if not given")
    parser.add_argument("--seeds", type=int, help="number of seeds; 3 if not given")
    parser.add_argument("--evaluations", type=int, help="of every run, evenly spaced; 7 if not given")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument(
        "--only", default="*", help="do the work of matching names alone, such as uw-* or *-seed-0"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny study of a minute or two, to see that it works"
    )
    parser.add_argument(
        "--report_only", action="store_true", help="write the report of what is there, no more"
    )
    parser.add_argument("--out", help="folder of the report; STUDY_DIR/report if not given")
    return parser


def _add_expert_arguments(parser: Any) -> None:
    parser.add_argument("--intervals", type=int, default=5, help="number of intervals, an expert for each")
    parser.add_argument(
        "--cost",
        choices=("timestep", "snr"),
        default="timestep",
        help="what the intervals hold together; timestep: equal lengths",
    )
    parser.add_argument("--iterations", type=int, help="of every expert; as many as the run's if not given")


def _bench_parser(jsonargparse: Any) -> Any:
    about = "Read the JSON files of the benchmark suite, which `make bench` in a checkout writes."
    return _subparser(jsonargparse, "bench", about)


def _add_bench_commands(jsonargparse: Any, parser: Any) -> None:
    commands: _Subcommands = {
        "report": (_report_parser, "Markdown tables and plots of any number of runs"),
        "compare": (
            _compare_parser,
            "what became slower from one run to another; exit status 1 if anything did",
        ),
    }
    _add_subcommands(jsonargparse, parser, "bench", commands)


def _add_subcommands(jsonargparse: Any, parser: Any, dest: str, commands: _Subcommands) -> None:
    found = parser.add_subcommands(dest=dest, help="one of these; each has its own --help")
    for name, (make, text) in commands.items():
        found.add_subcommand(name, make(jsonargparse), help=text)


def _report_parser(jsonargparse: Any) -> Any:
    parser = _subparser(
        jsonargparse,
        "bench report FILE ...",
        "Print what runs measured as Markdown tables. Files of one machine are put together, the latest run of a "
        "case counts. With --out, write them to report.md in a folder, with plots of ratios, growth and roofline; "
        "with --readme, rewrite the marked sections of a Markdown file.",
    )
    parser.add_argument("files", nargs="+", help="JSON files of runs")
    parser.add_argument("--out", help="folder for report.md, and for a folder of plots for every machine")
    parser.add_argument("--readme", nargs="+", default=[], help="Markdown files to rewrite, after the plots")
    return parser


def _compare_parser(jsonargparse: Any) -> Any:
    parser = _subparser(
        jsonargparse,
        "bench compare BEFORE AFTER",
        "Compare two runs on one machine, by ratios to the yardstick of the same round and by peak memory. Exit "
        "status 1 if one grew by more than between runs of the same code, or if something is no longer measured. "
        "What cannot be compared, and settings and versions that differ, are named.",
    )
    parser.add_argument("before", help="JSON file of the earlier run")
    parser.add_argument("after", help="JSON file of the later run")
    return parser


def _subparser(jsonargparse: Any, name: str, description: str) -> Any:
    class Formatter(jsonargparse.DefaultHelpFormatter):
        """The choices of an option stand beside its name already; here they would stand there twice."""

        def _expand_help(self, action: Any) -> str:
            return re.sub(r"type: Literal\[[^]]*\], ", "", super()._expand_help(action))

    return jsonargparse.ArgumentParser(
        usage=f"diffmtl-fast {name} [options]",
        description=description,
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _add_run_arguments(parser: Any, checkpoint: str | None = "checkpoint to use, not the newest") -> None:
    parser.add_argument("--run_dir", "--run", required=True, help="folder of the run")
    if checkpoint is not None:
        parser.add_argument("--checkpoint", metavar="NAME", help=checkpoint)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def _train(options: Any) -> None:
    from .train.config import Config, from_dict
    from .train.folder import RunFolder

    config = from_dict({name: value for name, value in options.as_dict().items() if name in Config.names()})
    from .train.run import train  # slow to import: after the options are checked

    train(config, RunFolder(Path(options.run_dir)), resume=options.resume, chosen=_path(options.checkpoint))


def _sample(options: Any) -> None:
    import numpy as np
    import torch

    from .train import plots
    from .train.sampling import balanced_labels

    out = Path(options.out)
    if out.suffix not in (".png", ".npy"):
        raise UserError(f"out: expected a file name that ends in .png or .npy, found {options.out}")
    _at_least("num", options.num, 1)
    trained = _load(options)
    classes = trained.data.num_classes
    labels = balanced_labels(options.num, classes)
    if options.label is not None:
        if not 0 <= options.label < classes:
            raise UserError(
                f"label: expected 0 <= label < {classes} (classes in the data), found {options.label}"
            )
        labels = torch.full((options.num,), options.label)
    pictures = trained.draw(labels, options.num, options.seed)
    with _writing("out", out) as aside:
        if out.suffix == ".npy":
            np.save(aside, pictures.numpy())
        else:
            plots.samples(aside, pictures, labels, trained.title)
    print(f"wrote {out}")


def _evaluate(options: Any) -> None:
    from .train.evaluation import table

    out = _path(options.out)
    if out is None and options.num is None and options.steps is None and options.checkpoint is None:
        out = Path(options.run_dir) / "metrics.json"
    metrics = _load(options).evaluate(options.num)
    if out is not None:
        with _writing("out", out) as aside:
            aside.write_text(json.dumps(metrics, indent=2) + "\n")
    print(table(metrics))


def _cluster(options: Any) -> None:
    from .clustering import cluster_intervals, cluster_path, report
    from .train.errors import blame

    levels = _log_snr(options)
    limits = {"min_size": options.min_size, "max_size": options.max_size}
    path = None
    with blame("clusters"):
        cost = report.named_cost(options.cost, _values(options, levels))
        if options.k == "auto":
            path = cluster_path(cost, 20 if options.k_max is None else options.k_max, **limits)
            clusters = path.chosen
        else:
            if options.k_max is not None:
                raise UserError(f"k_max: expected none without --k auto, found {options.k_max}")
            clusters = cluster_intervals(cost, k=_number_of_clusters(options.k), **limits)
    if options.plot is not None:
        from .train import plots
        from .train.titles import COST_TITLES

        title = f"{clusters.k} {COST_TITLES[options.cost]} clusters, {options.scheduler}"
        with _writing("plot", Path(options.plot)) as aside, blame("plot"):
            plots.clusters(aside, clusters, levels, title, path)
    if options.json:
        curve = {} if path is None else {"path": {"k": path.ks.tolist(), "cost": path.costs.tolist()}}
        found = report.as_dict(clusters, scheduler=options.scheduler, objective=options.cost, **curve)
        print(json.dumps(found))
    else:
        print(report.table(clusters, levels))


def _analyze(options: Any) -> None:
    analysis = options.analysis
    _ANALYSES[analysis](options[analysis])


def _affinity(options: Any) -> None:
    from .train import run_analysis
    from .train.folder import RunFolder

    if not options.memory > 0:
        raise UserError(f"memory: expected a number > 0, found {options.memory}")
    written = run_analysis.affinity(
        RunFolder(Path(options.run_dir)),
        options.device,
        _path(options.checkpoint),
        tasks=options.tasks,
        strided=options.strided,
        samples=options.samples,
        batch_size=options.batch_size,
        projection=options.projection,
        disattenuate=options.disattenuate,
        memory=int(options.memory * 2**30),
        seed=options.seed,
    )
    _tell(written)


def _negative_transfer(options: Any) -> None:
    from .train import run_analysis
    from .train.config import Clusters
    from .train.folder import RunFolder

    written = run_analysis.negative_transfer(
        RunFolder(Path(options.run_dir)),
        options.device,
        _path(options.checkpoint),
        intervals=Clusters(options.cost, options.intervals),
        iterations=options.iterations,
        expert_iteration=options.expert_iteration,
        num=options.num,
        steps=options.steps,
        resamples=options.resamples,
        seed=options.seed,
    )
    _tell(written)


def _difficulty(options: Any) -> None:
    from .train import run_analysis
    from .train.config import Clusters
    from .train.folder import RunFolder

    written = run_analysis.difficulty(
        RunFolder(Path(options.run_dir)),
        options.device,
        intervals=Clusters(options.cost, options.intervals),
        iterations=options.iterations,
        fraction=options.fraction,
    )
    _tell(written)


def _tell(written: list[Path]) -> None:
    for path in written:
        print(f"wrote {path}")


def _study(options: Any) -> None:
    from .study.folder import StudyFolder
    from .study.plan import Plan, make_plan
    from .study.report import write_report
    from .study.runner import study
    from .train.config import read_values

    folder, out = StudyFolder(Path(options.study_dir)), _path(options.out)
    if options.report_only:
        print(f"wrote {write_report(folder, folder.report if out is None else out)}")
        return
    given = (options.config, options.iterations, options.seeds, options.evaluations)
    if folder.plan.exists() and given == (None,) * 4 and not options.quick:
        plan = Plan.read(folder.plan)
    else:
        plan = make_plan(
            None if options.config is None else read_values(Path(options.config)),
            quick=options.quick,
            iterations=options.iterations,
            seeds=options.seeds,
            evaluations=options.evaluations,
        )
    study(
        plan,
        folder,
        jobs=options.jobs,
        threads=options.threads,
        only=options.only,
        report=out,
        command=_study_command(options),
    )


def _study_command(options: Any) -> str:
    """The command line that these options come from, those left out that are as by default."""
    defaults = _study_parser(require("jsonargparse", "train")).get_defaults()
    words = ["diffmtl-fast", "study"]
    for key, value in options.as_dict().items():
        if value != defaults[key]:
            flag = f"--{key.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def _bench(options: Any) -> int | None:
    command = options.bench
    return _BENCH_COMMANDS[command](options[command])


def _report(options: Any) -> None:
    from .bench import machines
    from .bench.plots import captions, draw
    from .bench.readme import rewrite
    from .bench.tables import report

    results = [_read_results("files", file) for file in options.files]
    text = report(results)
    if options.out is None and not options.readme:
        print(text)
    if options.out is not None:
        for found in machines(results):
            folder = Path(options.out) / found.name
            folder.mkdir(parents=True, exist_ok=True)
            for path in draw(found, folder):
                print(f"wrote {path}")
        with _writing("out", Path(options.out) / "report.md") as aside:
            aside.write_text(text, encoding="utf-8")
        print(f"wrote {Path(options.out) / 'report.md'}")
    for readme in map(Path, options.readme):
        names = [machine.name for machine in machines(results)]
        pictures = captions(Path(options.out), names, readme.parent) if options.out else {}
        try:
            rewritten = rewrite(readme.read_text(encoding="utf-8"), results, pictures)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"readme: {readme}: {error}") from error
        with _writing("readme", readme) as aside:
            aside.write_text(rewritten, encoding="utf-8")
        print(f"wrote {readme}")


def _compare(options: Any) -> int:
    from .bench import changes
    from .bench.compare import table

    before, after = _read_results("before", options.before), _read_results("after", options.after)
    try:
        found = changes(before, after)
    except ValueError as error:
        raise UserError(f"after: {error}") from error
    print(table(found))
    return REGRESSED if found.regressed else 0


def _read_results(name: str, file: str) -> Results:
    from .bench import Results

    try:
        return Results.read(Path(file))
    except FileNotFoundError as error:
        raise UserError(f"{name}: expected a file, found none at {file}") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _log_snr(options: Any) -> NDArray[np.float64]:
    """The log-SNR of the schedule that was named, or that the file holds."""
    import numpy as np

    from .train.components import load_array

    if options.scheduler in SCHEDULES:
        _at_least("timesteps", options.timesteps, 1)
        return named_log_snr(options.scheduler, options.timesteps)
    if Path(options.scheduler).suffix not in (".npy", ".json"):
        raise UserError(
            f"scheduler: expected {', '.join(SCHEDULES)}, or a .npy or .json file, found {options.scheduler!r}"
        )
    levels = load_array("scheduler", options.scheduler)
    if levels.ndim != 1 or levels.size == 0:
        raise UserError(
            f"scheduler: expected numbers [T] in {options.scheduler}, found shape {list(levels.shape)}"
        )
    bad = np.flatnonzero(~np.isfinite(levels))
    if bad.size:
        raise UserError(
            f"scheduler: expected finite numbers in {options.scheduler}, found {levels[bad[0]]} at index {bad[0]}"
        )
    return levels


def _values(options: Any, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the cost is computed from: the log-SNR, or the task affinities."""
    if (options.cost == "affinity") != (options.affinity is not None):
        raise UserError(
            "affinity: expected a .npy or .json file with cost affinity and none with another cost"
        )
    if options.affinity is None:
        return levels
    from .train.components import load_array

    affinity = load_array("affinity", options.affinity)
    if affinity.shape != (len(levels), len(levels)):
        raise UserError(f"affinity: expected [T, T] with T = {len(levels)}, found {list(affinity.shape)}")
    return affinity


def _number_of_clusters(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"k: expected an integer or auto, found {text!r}") from error


def _load(options: Any) -> TrainedDenoiser:
    from .train.folder import RunFolder
    from .train.trained_denoiser import load

    run = RunFolder(Path(options.run_dir))
    config = replace(run.read_config(), device=options.device)
    if options.steps is not None:
        _at_least("steps", options.steps, 1)
        config = replace(config, sampling=replace(config.sampling, steps=options.steps))
    return load(run, config, _path(options.checkpoint))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name}: expected at least {least}, found {value}")


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


@contextmanager
def _writing(name: str, path: Path) -> Iterator[Path]:
    """Write a file that the user named, all of it or nothing."""
    from ._files import replacing

    try:
        with replacing(path) as aside:
            yield aside
    except OSError as error:
        raise UserError(f"{name}: cannot write {path} ({error.strerror})") from error


_COMMANDS: dict[str, Callable[[Any], int | None]] = {
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "cluster": _cluster,
    "analyze": _analyze,
    "study": _study,
    "bench": _bench,
}
_BENCH_COMMANDS: dict[str, Callable[[Any], int | None]] = {
    "report": _report,
    "compare": _compare,
}
_ANALYSES: dict[str, Callable[[Any], None]] = {
    "affinity": _affinity,
    "negative-transfer": _negative_transfer,
    "difficulty": _difficulty,
}

if __name__ == "__main__":
    sys.exit(main())
