"""From names in the configuration to objects: models, schedulers, data, devices, clusters, weightings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._published_names import rename
from ..clustering import (
    BetaTime,
    IntervalClustering,
    LaplaceSigma,
    LogitNormalTime,
    ModeTime,
    cluster_affinity,
    cluster_snr,
    cluster_timesteps,
)
from ..clustering.inputs import load_values
from ..curriculum import (
    DifficultyCurriculum,
    DistributionSampler,
    LossSampler,
    LossSecondMomentSampler,
    RangeSampler,
    SpeeDSampler,
    StratifiedSampler,
    TimestepSampler,
    UniformSampler,
)
from ..curriculum.difficulty_curriculum import Sampling
from ..diffusion import scheduler_weights
from ..weighting import METHODS, ContinuousUncertainty, GramianWeighting, LossWeighting
from .config import CONTINUOUS, Clusters, Component, Config, Curriculum
from .data import ImageData
from .errors import UserError, blame

Array = NDArray[np.float64]


def import_object(key: str, path: str) -> Callable[..., Any]:
    """The class or function at an import path.

    Raises:
        UserError: there is none; the message begins with ``key``.
    """
    module, _, name = path.rpartition(".")
    with blame(f"{key}.path: cannot import {path!r}"):
        found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise UserError(f"{key}.path: expected a class or function, found {type(found).__name__} {path}")
    return found


def build(key: str, component: Component) -> Any:
    """Call a component with its arguments.

    Raises:
        UserError: it cannot be imported, or refuses the arguments.
    """
    target = import_object(key, component.path)
    with blame(f"{key}.args: {component.path}"):
        return target(**component.args)


def build_model(config: Config, data: ImageData, device: torch.device, num_timesteps: int = 1) -> nn.Module:
    """The denoiser with the weights that the seed gives it.

    It is checked by one call on two images: of the first and the last class, at the first and the last timestep.
    """
    torch.manual_seed(config.seed)
    model = build("model", config.model)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model: expected an nn.Module, found {type(model).__name__} from {config.model.path}"
        )
    _refuse_parameters(model)
    with blame("model"):
        model = model.to(device)
    labels = data.train_labels
    chosen = torch.arange(2) % len(data.train)
    if labels is not None:
        chosen = torch.stack([labels.argmin(), labels.argmax()])
    images, classes = data.train[chosen].to(device), None if labels is None else labels[chosen].to(device)
    with blame("model"):
        output = prediction(
            model(images, torch.tensor([0, num_timesteps - 1], device=device), **condition(classes))
        )
    if output.shape != images.shape:
        raise UserError(
            f"model: expected an output of the images' shape {list(images.shape)}, found {list(output.shape)}"
        )
    if not output.is_floating_point() or not output.requires_grad:
        found = f"{output.dtype}, {'with' if output.requires_grad else 'without'} a gradient"
        raise UserError(f"model: expected a floating-point output with a gradient, found one of {found}")
    return model


def _refuse_parameters(model: nn.Module) -> None:
    """Refuse a model that cannot be trained."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.is_meta or parameter.layout != torch.strided or not parameter.is_floating_point():
            kind = "a meta tensor" if parameter.is_meta else f"{parameter.dtype}, {parameter.layout}"
            raise UserError(
                f"model: expected dense floating-point parameters with values, found {name}: {kind}"
            )
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("model: expected a parameter that is trained (requires_grad), found none")


def build_scheduler(config: Config) -> Any:
    """The noise schedule, which `denoising.Denoising` reads."""
    scheduler = build("scheduler", config.scheduler)
    missing = [name for name in ("alphas_cumprod", "config") if not hasattr(scheduler, name)]
    if missing:
        raise UserError(
            f"scheduler: {config.scheduler.path} has no {missing[0]}; expected a discrete-time one"
        )
    with blame("scheduler"):
        _check_schedule(scheduler)
    return scheduler


def _check_schedule(scheduler: Any) -> None:
    number = getattr(scheduler.config, "num_train_timesteps", None)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"config.num_train_timesteps: expected an integer >= 1, found {number!r}")
    signal = torch.as_tensor(scheduler.alphas_cumprod)
    if signal.shape != (number,) or not bool(((signal >= 0) & (signal <= 1)).all()):
        raise ValueError(
            f"alphas_cumprod: expected {number} numbers from 0 to 1 (num_train_timesteps), found shape "
            f"{list(signal.shape)} of {signal.dtype}"
        )


def build_data(config: Config) -> ImageData:
    """The images."""
    data = build("data", config.data)
    if not isinstance(data, ImageData):
        raise UserError(f"data: expected {config.data.path} to return ImageData, found {type(data).__name__}")
    if config.evaluation.num_samples and (data.train_labels is None or data.test_labels is None):
        raise UserError(
            "evaluation.num_samples: expected 0 for data without labels (its metrics need classes)"
        )
    return data


def build_clusters(
    config: Clusters, levels: Callable[[], Array], num_timesteps: int, key: str = "clusters"
) -> IntervalClustering:
    """The clusters of a noise schedule.

    Args:
        config: what to minimise.
        levels: gives the log-SNR [T]; asked for only by the cost that needs it, since a schedule that ends in
            pure noise has none that is finite.
        num_timesteps: T.
        key: the option that the configuration came from.

    Raises:
        UserError: the clusters cannot be formed as asked.
    """
    low, high = config.min_size, config.max_size
    with blame(key):
        if config.cost == "timestep":
            return cluster_timesteps(num_timesteps, config.k, min_size=low, max_size=high)
        if config.cost == "snr":
            return cluster_snr(levels(), config.k, min_size=low, max_size=high)
        affinity = load_array(f"{key}.affinity", config.affinity)
        if affinity.shape != (num_timesteps, num_timesteps):
            raise ValueError(
                f"affinity: expected [T, T] with T = {num_timesteps}, found {list(affinity.shape)}"
            )
        return cluster_affinity(affinity, config.k, min_size=low, max_size=high)


def build_timesteps(
    config: Config, clusters: IntervalClustering, levels: Callable[[], Array]
) -> TimestepSampler:
    """What draws the timesteps of a batch.

    Args:
        config: the configuration.
        clusters: the tasks that the method balances.
        levels: gives the log-SNR [T]; asked for only where it is needed.

    Raises:
        UserError: it cannot be made as asked.
    """
    whole = IntervalClustering(np.array([0, clusters.num_timesteps]))
    balanced = config.balanced
    tasks = clusters if balanced else whole  # plain training averages over all timesteps
    if config.curriculum.order != "none":
        return _build_curriculum(config.curriculum, tasks, levels, "tasks" if balanced else "union")
    if config.timesteps.interval is not None:
        return _build_expert(config.timesteps.interval, clusters.num_timesteps)
    args, kind = config.timesteps.args, config.timesteps.sampler or ("stratified" if balanced else "uniform")
    with blame("timesteps.args"):
        if kind == "stratified":
            return StratifiedSampler(clusters, **args)
        if kind == "logit_normal":
            named = rename(args, {"logit_mean": "mean", "logit_std": "std"})
            return DistributionSampler(tasks, LogitNormalTime(**named))
        if kind == "mode":
            return DistributionSampler(tasks, ModeTime(**args))
        if kind == "beta":
            return DistributionSampler(tasks, BetaTime(**args))
        if kind == "laplace":
            return DistributionSampler(tasks, LaplaceSigma(**args), log_snr=levels())
        if kind == "second_moment":
            return LossSecondMomentSampler(tasks, **args)
        if kind == "loss":
            return LossSampler(tasks, **args)
        if kind == "range":
            return RangeSampler(tasks, **args)
        if kind == "speed":
            return SpeeDSampler(tasks, levels(), **args)
        return UniformSampler(tasks, **args)


def _build_expert(interval: list[int], num_timesteps: int) -> UniformSampler:
    first, end = interval
    if end > num_timesteps:
        raise UserError(f"timesteps.interval: expected an end of at most {num_timesteps}, found {end}")
    bounds = np.unique([0, first, end, num_timesteps])
    return UniformSampler(IntervalClustering(bounds), only=int(np.searchsorted(bounds, first)))


def _build_curriculum(
    config: Curriculum, tasks: IntervalClustering, levels: Callable[[], Array], sampling: Sampling
) -> DifficultyCurriculum:
    clusters = build_clusters(config.clusters, levels, tasks.num_timesteps, "curriculum.clusters")
    assert config.order != "none"
    with blame("curriculum"):
        return DifficultyCurriculum(
            clusters,
            config.patience,
            max_length=config.max_length,
            smoothing=config.smoothing,
            min_delta=config.min_delta,
            order=config.order,
            sampling=config.sampling or sampling,
            tasks=tasks,
        )


def build_loss_weights(config: Config, scheduler: Any, device: torch.device) -> Tensor | None:
    """The weight of the squared error at every timestep, float32 [T]; None for 1 everywhere.

    Raises:
        UserError: the weight does not take the arguments, or has no bound on this schedule.
    """
    name = config.loss.weight
    if name == "none":
        return None
    with blame("loss.args"):
        return scheduler_weights(scheduler, name, **config.loss.args).to(device)


def build_weighting(
    config: Config, k: int, device: torch.device
) -> LossWeighting | GramianWeighting | ContinuousUncertainty | None:
    """The balancing method, of k clusters or of all noise levels; None for plain training.

    Raises:
        UserError: an option of the method is out of range.
    """
    if config.method == CONTINUOUS:
        return ContinuousUncertainty().to(device)
    if not config.balanced:
        return None
    with blame(config.method):
        return METHODS[config.method].build(k, device, config.seed, **config.method_options())


def load_array(key: str, path: str | Path | None) -> np.ndarray:
    """Read numbers from a .npy or .json file.

    Raises:
        UserError: it is missing or holds none; the message begins with ``key``.
    """
    try:
        return load_values(str(path))
    except (OSError, ValueError, MemoryError, OverflowError, RecursionError) as error:
        raise UserError(f"{key}: cannot read {path} ({error})") from error


def resolve_device(name: str) -> torch.device:
    """The device of a name: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: no such device in this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device: {name!r} is not there; this machine has {count} CUDA devices")
    elif device.type != "cpu":
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    return device


def condition(labels: Tensor | None) -> dict[str, Tensor]:
    """Keyword arguments that pass the classes to a model."""
    return {} if labels is None else {"class_labels": labels}


def prediction(output: Any) -> Tensor:
    """The tensor in what a model returned: itself, or the ``sample`` of a diffusers output.

    Raises:
        UserError: it returned neither.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    if not isinstance(found, Tensor):
        raise UserError(
            f"model: expected it to return a tensor, or one as .sample, found {type(output).__name__}"
        )
    return found
