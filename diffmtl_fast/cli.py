"""The command line: ``diffmtl-fast train | sample | evaluate | cluster``.

Parsing needs jsonargparse alone; diffusers, scikit-learn and matplotlib load when a command needs them.
What the user can put right is reported as one line on standard error, with exit status 2; training that diverges
likewise, with exit status 1. Anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from ._extras import require
from .train.errors import TrainingDiverged, UserError
from .train.schedules import SCHEDULES, named_log_snr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .clustering import IntervalClustering
    from .train.trained import Trained

DIVERGED, USAGE, INTERRUPTED = 1, 2, 130
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
        options = _parser(jsonargparse).parse_args(
            _underscored(sys.argv[1:] if arguments is None else arguments)
        )
        command = options.command
        _COMMANDS[command](options[command])
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
    return 0


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
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1", message)
    message = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", message)
    message = re.sub(
        r"Does not validate against any of the Union subtypes.*", "expected another type of value", message
    )
    return re.sub(r"\. Got value: (.*)$", r", found \1", message)


def _parser(jsonargparse: Any) -> Any:
    parser = jsonargparse.ArgumentParser(
        prog="diffmtl-fast",
        description="Train diffusion models as multi-task learning over noise levels. "
        "Options may be spelt with hyphens or underscores.",
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=f"diffmtl-fast {__version__}")
    commands = parser.add_subcommands(dest="command", help="one of these; each has its own --help")
    for name, (make, text) in {
        "train": (_train_parser, "train a model; write weights, pictures and metrics"),
        "sample": (_sample_parser, "draw pictures from a run"),
        "evaluate": (_evaluate_parser, "measure how close a run's pictures come to real ones"),
        "cluster": (_cluster_parser, "group the timesteps of a noise schedule"),
    }.items():
        commands.add_subcommand(name, make(jsonargparse), help=text)
    return parser


def _train_parser(jsonargparse: Any) -> Any:
    from .train import config

    parser = _subparser(
        jsonargparse, "train", "Train a model. What is not given is as in the bundled run on digits."
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
    parser.set_defaults(config.digits())
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
        help=f"{', '.join(SCHEDULES)}, or a .npy file of log-SNR [T]",
    )
    parser.add_argument("--timesteps", type=int, default=1000, help="T of a named schedule")
    parser.add_argument("--k", type=int, default=5, help="number of clusters")
    parser.add_argument(
        "--cost",
        choices=("snr", "timestep", "affinity"),
        default="snr",
        help="what the clusters hold together: log-SNR, timestep or task affinity",
    )
    parser.add_argument("--affinity", help=".npy file with the T x T task affinities, for cost affinity")
    parser.add_argument("--min_size", type=int, help="fewest timesteps of a cluster")
    parser.add_argument("--max_size", type=int, help="most timesteps of a cluster")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--plot", help="picture file of the log-SNR curve with the clusters")
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
    )


def _add_run_arguments(parser: Any) -> None:
    parser.add_argument("--run_dir", required=True, help="folder of the run")
    parser.add_argument("--checkpoint", metavar="NAME", help="checkpoint to use, not the newest")
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
    from .train.components import build_clusters
    from .train.config import Clusters

    if (options.cost == "affinity") != (options.affinity is not None):
        raise UserError("affinity: expected a .npy file with cost affinity and none with another cost")
    levels = _log_snr(options)
    settings = Clusters(options.cost, options.k, options.min_size, options.max_size, options.affinity)
    clusters = build_clusters(settings, lambda: levels, len(levels))
    if options.plot is not None:
        from .train import plots
        from .train.errors import blame
        from .train.trained import clusters_title

        title = f"{clusters_title(settings)}, {options.scheduler}"
        with _writing("plot", Path(options.plot)) as aside, blame("plot"):
            plots.clusters(aside, clusters, levels, title)
    if options.json:
        print(json.dumps({"scheduler": options.scheduler, "objective": options.cost, **clusters.to_dict()}))
    else:
        _print_table(clusters, levels)


def _log_snr(options: Any) -> NDArray[np.float64]:
    """The log-SNR of the schedule that was named, or that the file holds."""
    import numpy as np

    from .train.components import load_array

    if options.scheduler in SCHEDULES:
        _at_least("timesteps", options.timesteps, 1)
        return named_log_snr(options.scheduler, options.timesteps)
    if not options.scheduler.endswith(".npy"):
        raise UserError(
            f"scheduler: expected {', '.join(SCHEDULES)} or a .npy file, found {options.scheduler!r}"
        )
    levels = load_array("scheduler", options.scheduler)
    if levels.ndim != 1 or levels.size == 0 or levels.dtype.kind not in "fiu":
        raise UserError(
            f"scheduler: expected numbers [T] in {options.scheduler}, found {levels.dtype} {list(levels.shape)}"
        )
    bad = np.flatnonzero(~np.isfinite(levels))
    if bad.size:
        raise UserError(
            f"scheduler: expected finite numbers in {options.scheduler}, found {levels[bad[0]]} at index {bad[0]}"
        )
    return levels.astype(float)


def _print_table(clusters: IntervalClustering, levels: NDArray[np.float64]) -> None:
    print(f"{'cluster':>7}  {'timesteps':>15}  {'size':>7}  {'log-SNR':>18}")
    edges = clusters.boundaries.tolist()
    for cluster, (start, stop) in enumerate(itertools.pairwise(edges)):
        span = f"{levels[start]:.2f} ... {levels[stop - 1]:.2f}"
        print(f"{cluster:>7}  {f'{start} ... {stop - 1}':>15}  {stop - start:>7}  {span:>18}")
    print(f"cost {clusters.cost:.6f}")


def _load(options: Any) -> Trained:
    from .train.folder import RunFolder
    from .train.trained import load

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
    from .train.files import replacing

    try:
        with replacing(path) as aside:
            yield aside
    except OSError as error:
        raise UserError(f"{name}: cannot write {path} ({error.strerror})") from error


_COMMANDS: dict[str, Callable[[Any], None]] = {
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "cluster": _cluster,
}

if __name__ == "__main__":
    sys.exit(main())
