"""Training from start, or from where it stopped, to the pictures and metrics."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .._errors import TrainingDiverged, UserError, blame
from .._extras import require
from .._figures import smooth
from .._files import replacing
from .._progress import NoProgress, open_progress
from ..analysis import Judge
from ..clustering.continuous import in_timesteps
from ..distributed import launched
from ..train import checkpoint, history
from ..train.components import build_model
from ..train.config import FREE_ON_RESUME, NEIGHBOURS, PLAIN, Config, differences, to_dict
from ..train.folder import RunFolder
from ..train.history import History
from ..train.loop import Trainer
from ..train.monitor import HeldOutLoss, Monitor
from ..train.sinks import Sink, TensorBoard, WeightsAndBiases
from ..weighting import ContinuousUncertainty
from . import evaluation, plots
from .sampling import build_decoder
from .titles import clusters_title, method_title
from .trained_denoiser import load, load_power_average, of_trainer

# What else drawn pictures and their metrics depend on.
_DRAWING = ("sampling.", "evaluation.")

# Images of the data that a rehearsal measures with.
REHEARSED = 64
# Of the log, whose losses are averaged for the picture of the uncertainty.
LINES_DRAWN = 20


def train(
    config: Config,
    run: RunFolder,
    *,
    resume: bool = False,
    chosen: Path | str | None = None,
    outputs: bool = True,
) -> None:
    """Train, then write the weights, the pictures and the metrics.

    Args:
        config: the configuration.
        run: where.
        resume: continue the run that is there, if there is one.
        chosen: checkpoint to continue from instead of the newest; newer ones are deleted.
        outputs: without them the log and the checkpoints are all there is, which does for an expert that draws no
            pictures of its own.

    Raises:
        UserError: the run cannot be started or continued as asked.
        TrainingDiverged: a loss or a weight is not finite.
    """
    if launched.waiting() and not config.balanced and config.method != PLAIN:
        raise UserError(
            f"method: expected one of clusters, or {PLAIN}, in several processes, found {config.method}"
        )
    with launched.joined(config.device) as device:
        _train(replace(config, device=device), run, resume, chosen, outputs)


def _train(config: Config, run: RunFolder, resume: bool, chosen: Path | str | None, outputs: bool) -> None:
    begun = run.begun
    launched.barrier()  # all have looked before the first one makes the folder
    if begun and not resume:
        raise UserError(
            f"run folder {run}: holds a run already; --resume continues it, --run-dir names another"
        )
    if chosen is not None and not begun:
        raise UserError(f"--checkpoint: expected an existing run and --resume, found no run in {run}")
    if begun:
        _check_same(config, run)
        last = run.checkpoint(chosen)
        if last is None and run.model.exists():
            raise UserError(
                f"run folder {run}: expected a checkpoint of this finished run, found none, and training anew "
                "would delete its model; --run-dir names another folder"
            )
        if last is not None and not _draws_otherwise(config, run) and _complete(config, run, last, outputs):
            print(f"{run} is already complete")
            return
    trainer = Trainer(config)  # before the folder is made, so that a bad option leaves nothing behind
    if launched.rank() > 0:
        with _stopping(trainer):
            _follow(trainer, run.checkpoint(chosen) if begun else None, run.checkpoints)
        return
    if outputs:
        rehearse(trainer)
    run.create()
    with run.lock():
        if begun and _draws_otherwise(config, run):
            run.remove_outputs()
        run.write_config(config)
        print(_summary(trainer), flush=True)
        try:
            with _stopping(trainer):
                _fit(trainer, run, chosen)
        except TrainingDiverged as error:
            good = run.checkpoint()
            raise TrainingDiverged(f"{error}; the last good checkpoint is {good or 'none'}") from error
        if outputs:
            _write_outputs(trainer, run)
    print(f"finished; see {run}")


def rehearse(trainer: Trainer) -> None:
    """Draw, put into a picture and measure a few pictures of the untrained model: what the run's end will do.

    Random states and the model's mode are put back.

    Raises:
        UserError: the end of the run would fail.
    """
    config, model = trainer.config, trainer.model
    if trainer.sharded:  # whose forward is all processes'
        model = build_model(config, trainer.data, trainer.device)
    with blame("data"):
        data = trainer.data.images(REHEARSED)
    fewest = min(len(data.train), len(data.test))
    if config.evaluation.num_samples and fewest <= NEIGHBOURS:
        raise UserError(
            f"evaluation.num_samples: expected 0 for data with fewer than {NEIGHBOURS + 1} pictures to train on "
            f"or held out, found {fewest}"
        )
    kind = trainer.scheduler.config.get("prediction_type", "epsilon")
    signal = torch.as_tensor([] if trainer.process.continuous else trainer.scheduler.alphas_cumprod)
    if kind == "epsilon" and bool((signal == 0).any()):
        raise UserError(
            "sampling: expected prediction type v_prediction or sample for a schedule that ends in pure noise, of "
            "which epsilon tells nothing, found epsilon"
        )
    some = torch.linspace(0, len(data.train) - 1, min(len(data.train), REHEARSED)).long()
    few = torch.linspace(0, len(data.test) - 1, min(len(data.test), REHEARSED)).long()
    labels = None if data.train_labels is None else data.train_labels[some[: NEIGHBOURS + 1]]
    training = model.training
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices), tempfile.TemporaryDirectory() as folder:
        drawn = replace(of_trainer(trainer), model=model)
        count = 2 if labels is None else len(labels)
        pictures = drawn.draw(drawn.conditions(count) if labels is None else labels, count, config.seed)
        save = getattr(model, "save_pretrained", None)
        if callable(save) and not config.compute.lora:
            with blame("model: save_pretrained"):
                save(Path(folder) / "model")
                if not (Path(folder) / "model").exists():
                    raise ValueError("expected a file or folder where it was told to write, found none")
        with blame("samples.png"):
            plots.samples(Path(folder) / "samples.png", pictures, labels, "rehearsal")
        if config.evaluation.validation_every:
            HeldOutLoss(trainer)(model)
        if config.logging.wandb is not None:
            with blame("logging.wandb"):
                require("wandb", "wandb")
        if config.evaluation.num_samples and config.evaluation.features.path != "auto":
            evaluation.build_features(config.evaluation.features, trainer.device)(pictures)
        elif config.evaluation.num_samples and labels is not None:
            assert data.train_labels is not None
            assert data.test_labels is not None
            kinds, found = data.train_labels[some].unique(return_inverse=True)
            train, test = data.train[some], data.test[few]
            decode = build_decoder(trainer.data, trainer.device)
            if decode is not None:
                train, test = decode(train), decode(test)
            with blame("evaluation"):
                judge = Judge.by_classifier(train, found, test, data.test_labels[few] % len(kinds))
                judge.evaluate(pictures, found[: len(labels)], config.seed)
    with blame("model"):
        model.train(training)


@contextlib.contextmanager
def _stopping(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop training after the present iteration; a second one stops it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        trainer.stop = "interrupted" if number == signal.SIGINT else "terminated"
        if launched.world() == 1:  # of several, a launcher passes on what they have had themselves
            for each, handler in before.items():
                signal.signal(each, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _draws_otherwise(config: Config, run: RunFolder) -> bool:
    """Whether pictures and metrics that are there are of other options."""
    return any(key.startswith(_DRAWING) for key in differences(config, run.read_config()))


def _summary(trainer: Trainer) -> str:
    config = trainer.config
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"{method_title(config)}, {size:,} parameters, {len(trainer.data.training):,} images, {trainer.device}, "
        f"{config.precision}"
    )


def _check_same(config: Config, run: RunFolder) -> None:
    for key, (now, then) in differences(config, run.read_config()).items():
        longer = key == "iterations" and config.optimizer.schedule != "constant"
        if longer or not key.startswith(FREE_ON_RESUME):
            raise UserError(
                f"{key}: expected {then!r}, as in the run that --resume continues, found {now!r} "
                "(what is not given is as in that run)"
            )


def _complete(config: Config, run: RunFolder, last: Path, outputs: bool) -> bool:
    done = checkpoint.iteration(last)
    if done > config.iterations:
        raise UserError(
            f"iterations: expected at least {done}, which the run has done, found {config.iterations}"
        )
    wanted = run.outputs(config) if outputs else []
    return done == config.iterations and all(path.exists() for path in wanted)


def _fit(trainer: Trainer, run: RunFolder, chosen: Path | str | None) -> None:
    """Train from the checkpoint, if there is one, to the last iteration."""
    start = run.checkpoint(chosen)
    if start is None:
        # A run that was killed before its first checkpoint begins anew.
        run.log.unlink(missing_ok=True)
        for folder in (run.tensorboard, run.power_ema):
            shutil.rmtree(folder, ignore_errors=True)
    sinks = _sinks(trainer.config, run, start)

    def draw_some(count: int) -> torch.Tensor:
        return of_trainer(trainer).draw_some(count)

    with contextlib.closing(History(run.log, sinks, Monitor(trainer, sinks, draw_some))) as log:
        if start is not None:
            trainer.load(start, log)
        launched.barrier()  # all have read before anything is removed or written
        if start is not None:
            run.remove_newer(start)
            print(f"continuing {run} from iteration {trainer.iteration}")
        if trainer.iteration < trainer.config.iterations:
            run.remove_outputs()  # those of a shorter run would pass for this one's
        with contextlib.closing(open_progress(trainer.config.iterations, trainer.iteration)) as progress:
            trainer.fit(run.checkpoints, log, progress)


def _sinks(config: Config, run: RunFolder, start: Path | None) -> list[Sink]:
    """Where figures go beside the log."""
    sinks: list[Sink] = []
    if config.logging.tensorboard:
        sinks.append(TensorBoard(run.tensorboard, 0 if start is None else checkpoint.iteration(start)))
    if config.logging.wandb is not None:
        sinks.append(WeightsAndBiases(config.logging.wandb, run.path, to_dict(config), start is not None))
    return sinks


def _follow(trainer: Trainer, start: Path | None, checkpoints: Path) -> None:
    """Train with the first process, which alone writes."""
    with contextlib.closing(History(Path(os.devnull))) as log:
        if start is not None:
            trainer.load(start, log)
        launched.barrier()
        trainer.fit(checkpoints, log, NoProgress())


def _write_outputs(trainer: Trainer, run: RunFolder) -> None:
    """Write what is not there yet; a run killed on the way has a part of it."""
    if trainer.sharded:
        trained = load(run, trainer.config)
    else:
        load_power_average(run, trainer.config, trainer.iteration, trainer.ema.model)
        trained = of_trainer(trainer)
    writers: dict[Path, Callable[[Path], object]] = {
        run.model: trained.write_model,
        run.clusters: lambda path: write_clusters(trainer, path),
        run.training: lambda path: write_training(run, trained.title, path),
        run.uncertainty: lambda path: write_uncertainty(trainer, run, path),
        run.samples: trained.write_samples,
        run.metrics: trained.write_metrics,
    }
    for path in run.outputs(trainer.config):
        if not path.exists():
            print(f"writing {path}", flush=True)
            writers[path](path)
    if run.metrics.exists():
        print(evaluation.table(json.loads(run.metrics.read_text())))


def write_clusters(trainer: Trainer, path: Path) -> None:
    """Draw the clusters of a run."""
    levels = trainer.noise.log_snr(plots.LOG_SNR_DRAWN)
    with replacing(path) as aside:
        found = replace(trainer.config.clusters, k=trainer.clusters.k)  # the number where that was "auto"
        shown = in_timesteps(trainer.clusters, trainer.noise.num_timesteps)
        plots.clusters(aside, shown, levels, clusters_title(found), continuous=trainer.process.continuous)


def write_uncertainty(trainer: Trainer, run: RunFolder, path: Path) -> None:
    """Draw the log-variance that continuous uncertainty weighting learned, beside the clusters' last losses."""
    assert isinstance(trainer.weighting, ContinuousUncertainty)
    levels = trainer.noise.log_snr(plots.LOG_SNR_DRAWN)
    with torch.no_grad():
        log_var = trainer.weighting.log_var(torch.from_numpy(levels).float().to(trainer.device)).cpu().numpy()
    lines = history.read(run.log)
    losses = np.array([line["losses"] for line in lines], dtype=float)  # None becomes NaN
    means = smooth(losses, LINES_DRAWN)[-1]
    clusters = in_timesteps(trainer.clusters, trainer.noise.num_timesteps)
    centres = np.add.reduceat(levels, clusters.boundaries[:-1]) / clusters.sizes
    with replacing(path) as aside:
        plots.uncertainty(aside, levels, log_var, centres, np.log(means), method_title(trainer.config))


def write_training(run: RunFolder, title: str, path: Path) -> None:
    """Draw the course of a run from its log."""
    with replacing(path) as aside:
        plots.training(aside, history.read(run.log), title)
