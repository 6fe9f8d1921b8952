"""From names in the configuration to objects: models, schedulers, data, devices, clusters, weightings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._errors import UserError, blame
from .._extras import require
from ..clustering import NoiseClustering, NoiseDistribution
from ..clustering.distributions import LAWS
from ..clustering.inputs import load_affinity, named_clusters
from ..curriculum import DifficultyCurriculum, TimestepSampler
from ..curriculum._levels import Clustering, cut
from ..curriculum.difficulty_curriculum import Sampling
from ..curriculum.named import interval_sampler, named_sampler
from ..data import Classes, Conditioning, Embeddings, FileData, ImageData, Text
from ..data.conditioning import times_keyword
from ..data.sources import extremes
from ..diffusion import loss_weight, noise_process
from ..diffusion.training_noise import TrainingNoise, level_distribution
from ..weighting import METHODS, ContinuousUncertainty, GramianWeighting, LossWeighting
from .config import CONTINUOUS, Clusters, Component, Compute, Config, Curriculum

Array = NDArray[np.float64]
Data: TypeAlias = ImageData | FileData
# A loss weight that no schedule which keeps some signal and some noise comes near.
_UNBOUNDED = 1e12


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


def build_model(config: Config, data: Data, device: torch.device, last_time: float = 0) -> nn.Module:
    """The denoiser with the weights that the seed gives it.

    It is checked by one call on two samples: of the first and the last class where samples are in memory, with the
    least and the largest time (`last_time`) that it is told.
    """
    torch.manual_seed(config.seed)
    model = build("model", config.model)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model: expected an nn.Module, found {type(model).__name__} from {config.model.path}"
        )
    with blame("model"):
        model = _prepared(model, config.compute)
    _refuse_parameters(model)
    with blame("model"):
        model = model.to(device)
    with blame("data"):
        batch = extremes(data).to(device)
    images = batch.x
    # The last sample also without its condition, for which there has to be one class more.
    dropped = torch.tensor([False, True], device=device) if config.conditioning.dropout else None
    arguments = build_conditioning(config, data, device).arguments(batch.conditioning, dropped)
    with blame("model"):
        model.state_dict()
        told = torch.tensor([0, last_time], device=device)
        try:
            output = prediction(denoise(model, images, told, arguments))
        except IndexError as error:
            spare = ", and of one more for those that are dropped" if config.conditioning.dropout else ""
            raise ValueError(f"expected embeddings of {data.num_classes} classes{spare} ({error})") from error
    refuse_output(output, images)
    if not output.requires_grad:
        raise UserError("model: expected an output with a gradient, found one without")
    if not output.isfinite().all():
        raise UserError("model: expected a finite output, found NaN or infinity")
    return model


def _prepared(model: nn.Module, options: Compute) -> nn.Module:
    """The model with the weights to start from, adapters, checkpointing and memory layout as asked."""
    if options.weights is not None:
        with blame("compute.weights", (OSError, RuntimeError, ValueError)):
            require("safetensors.torch", "train").load_model(model, options.weights)
    if options.lora:
        peft = require("peft", "lora")
        adapters = peft.LoraConfig(r=options.lora, target_modules=options.lora_targets)
        with blame("compute.lora_targets"):
            peft.inject_adapter_in_model(adapters, model)
    if options.checkpointing:
        with blame("compute.checkpointing", (AttributeError, ValueError)):
            model.enable_gradient_checkpointing()  # type: ignore[operator]
    return model.to(memory_format=torch.channels_last) if options.channels_last else model  # type: ignore[call-overload]


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
    """The scheduler that the noise process is read from, see `diffmtl_fast.diffusion.noise_process`."""
    scheduler = build("scheduler", config.scheduler)
    with blame("scheduler"):
        if getattr(scheduler, "alphas_cumprod", None) is not None:
            _check_schedule(scheduler)
        noise_process(scheduler)
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


def build_noise(config: Config, scheduler: Any, device: torch.device | str = "cpu") -> TrainingNoise:
    """The noise process of a scheduler, with the loss weight and the levels of the configuration.

    Raises:
        UserError: the scheduler, the loss weight or the distribution of the levels cannot be used.
    """

    def weigh(log_snr: Tensor) -> Tensor:
        return loss_weight(config.loss.weight, log_snr, **config.loss.args)

    weighted = config.loss.weight != "none"
    if weighted:
        with blame("loss.args"):
            weigh(torch.zeros(1))
    with blame("scheduler"):
        process = noise_process(scheduler, device, weigh if weighted else None)
    distribution, bounds = None, config.clusters.clip
    if process.continuous:
        name = config.timesteps.sampler if config.timesteps.sampler in LAWS else None
        shift = float(scheduler.config.get("shift", 1.0))
        with blame("timesteps"):
            distribution = level_distribution(process, name, config.timesteps.args if name else {}, shift)
    clip = None if bounds is None else (bounds[0], bounds[1])
    noise = TrainingNoise(process, scheduler, distribution, clip, device)
    weights = process.weight(noise.levels)
    if weights is not None and not weights.max() < _UNBOUNDED:
        kind = scheduler.config.get("prediction_type", "epsilon")
        raise UserError(
            f"loss.weight: expected one that is bounded for prediction type {kind} on this schedule, found "
            f"{config.loss.weight}, which is {weights.max():.3g} at timestep {int(weights.argmax())}"
        )
    return noise


def build_data(config: Config) -> Data:
    """The samples."""
    data = build("data", config.data)
    if not isinstance(data, ImageData | FileData):
        raise UserError(
            f"data: expected {config.data.path} to return ImageData or FileData, found {type(data).__name__}"
        )
    if isinstance(data, ImageData):
        with blame("data"):
            data.check()
    if config.evaluation.num_samples and not data.num_classes and config.evaluation.features.path == "auto":
        raise UserError(
            "evaluation.num_samples: expected 0 for data without labels (a classifier of them gives the features, "
            "unless evaluation.features names others)"
        )
    return data


def build_clusters(
    config: Clusters,
    levels: Callable[[], Array],
    num_timesteps: int,
    key: str = "clusters",
    distribution: NoiseDistribution | None = None,
) -> Clustering:
    """The clusters of a noise schedule.

    Args:
        config: what to minimise.
        levels: gives the log-SNR [T]; asked for only by the cost that needs it, since a schedule that ends in
            pure noise has none that is finite.
        num_timesteps: T.
        key: the option that the configuration came from.
        distribution: of continuous levels, of which the timesteps are T cells of equal probability.

    Raises:
        UserError: the clusters cannot be formed as asked.
    """
    with blame(key):
        if config.cost == "affinity":
            with blame(f"{key}.affinity"):
                values = load_affinity(str(config.affinity), num_timesteps)
        else:  # of continuous levels and of timesteps alone, only how many there are matters
            alone = config.cost == "timestep" or distribution is not None
            values = np.arange(float(num_timesteps)) if alone else levels()
        return named_clusters(
            config.cost,
            config.k,
            values,
            min_size=config.min_size,
            max_size=config.max_size,
            distribution=distribution,
        )


def build_timesteps(
    config: Config,
    clusters: Clustering,
    levels: Callable[[], Array],
    num_timesteps: int | None = None,
) -> TimestepSampler:
    """What draws the noise levels of a batch.

    Args:
        config: the configuration.
        clusters: the tasks that the method balances.
        levels: gives the log-SNR [T]; asked for only where it is needed.
        num_timesteps: T; the clusters' own by default.

    Raises:
        UserError: it cannot be made as asked.
    """
    number = num_timesteps if isinstance(clusters, NoiseClustering) else clusters.num_timesteps
    assert number is not None
    balanced = config.balanced
    tasks = clusters if balanced else cut(clusters, np.array([0.0, 1.0]))  # plain training has one
    if config.curriculum.order != "none":
        return _build_curriculum(config.curriculum, tasks, levels, number, "tasks" if balanced else "union")
    if config.timesteps.interval is not None:
        first, end = config.timesteps.interval
        with blame("timesteps.interval"):
            return interval_sampler(clusters, first, end, number)
    usual = "stratified" if balanced else "uniform"
    name, args = config.timesteps.sampler or usual, config.timesteps.args
    if isinstance(clusters, NoiseClustering) and name in LAWS:
        # That is the distribution of the clusters' levels; what is left to say is how a batch takes from them.
        name, args = usual, {}
    with blame("timesteps.args"):
        return named_sampler(name, clusters if name == "stratified" else tasks, args, levels)


def _build_curriculum(
    config: Curriculum,
    tasks: Clustering,
    levels: Callable[[], Array],
    num_timesteps: int,
    sampling: Sampling,
) -> DifficultyCurriculum:
    distribution = tasks.distribution if isinstance(tasks, NoiseClustering) else None
    clusters = build_clusters(config.clusters, levels, num_timesteps, "curriculum.clusters", distribution)
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


def build_schedule(config: Config, optimizer: torch.optim.Optimizer) -> Any:
    """What changes the learning rates from step to step; None where they stay."""
    options = config.optimizer
    if options.schedule == "constant" and not options.warmup:
        return None
    name = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    get_scheduler = require("diffusers.optimization", "train").get_scheduler
    return get_scheduler(
        name, optimizer, num_warmup_steps=options.warmup, num_training_steps=config.iterations
    )


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


def build_conditioning(config: Config, data: Data, device: torch.device) -> Conditioning:
    """What passes the conditions of the data to the model.

    Raises:
        UserError: there is no text encoder for captions, or it cannot be loaded.
    """
    options = config.conditioning
    with blame("data"):
        conditions = extremes(data).conditioning if options.enabled else None
    named = {} if options.argument is None else {"argument": options.argument}
    if conditions is None:
        return Conditioning()
    if isinstance(conditions, Tensor):
        return Classes(data.num_classes, **named) if conditions.dim() == 1 else Embeddings(**named)
    if options.encoder is None:
        raise UserError(
            "conditioning.encoder: expected the folder of a text encoder for captions, found null"
        )
    with blame("conditioning.encoder", (OSError, ValueError, TypeError, AttributeError, ImportError)):
        return Text(options.encoder, device, mask=options.mask, max_length=options.max_length, **named)


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


def denoise(
    model: Callable[..., Any], x: Tensor, time: Tensor, arguments: dict[str, Any], **more: Any
) -> Any:
    """Call a model, or its wrapper, with a noisy input, the time and conditions; returns what it returns."""
    name = times_keyword(getattr(model, "module", model))
    if name is None:
        return model(x, time, **arguments, **more)
    return model(x, **{name: time}, **arguments, **more)


def refuse_output(output: Tensor, images: Tensor) -> None:
    """Refuse a prediction that is not floating point of the images' shape.

    Raises:
        UserError: it is such.
    """
    if output.shape != images.shape or not output.is_floating_point():
        raise UserError(
            f"model: expected a floating-point output of the images' shape {list(images.shape)}, found "
            f"{output.dtype} {list(output.shape)}"
        )


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
