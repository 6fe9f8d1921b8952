"""The configuration of a training run: plain dataclasses, read from YAML and the command line."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from .._errors import UserError, blame, readable
from .._extras import require
from .._number_types import (
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Seed,
    Size,
    SizeOrZero,
    UnitFloat,
    Workers,
    bounded,
    plain,
)
from ..curriculum.named import SamplerName
from ..weighting import METHODS
from .ema import exponent

#: The method that balances nothing: the mean over all samples.
PLAIN = "vanilla"
#: The method that weighs every sample by its noise level, without clusters.
CONTINUOUS = "continuous_uw"
#: Most samples of a kind that metrics and analyses take into memory.
IN_MEMORY = 10_000
# What may differ when a run is resumed, because the iterations already done do not depend on it. A run may be
# made longer unless its learning rates fall towards its end. Of the device the type alone counts, and Trainer.load
# compares it.
FREE_ON_RESUME = ("iterations", "device", "checkpoints.", "logging.", "sampling.", "evaluation.")
# Of the k-nearest-neighbour precision and recall.
NEIGHBOURS = 3


@dataclass(frozen=True)
class Component:
    """A class or function by import path, with the keyword arguments to call it with.

    Attributes:
        path: import path of a class or function
        args: keyword arguments; change one with .args.NAME VALUE
    """

    path: str = ""
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Clusters:
    """How the timesteps are grouped into tasks: intervals that minimise a cost.

    Attributes:
        cost: spread of the log-SNR in an interval, of the timestep, or dissimilarity of the tasks' gradients
        k: number of clusters, 1 to T, or auto: chosen from the cost curve
        min_size: fewest timesteps of a cluster; null for no limit
        max_size: most timesteps of a cluster; null for no limit
        affinity: .npy or .json file with the T x T matrix of task affinities, for cost affinity
        clip: bounds of the log-SNR, such as [-20, 20], for schedules that end in pure noise; null for none
    """

    cost: Literal["snr", "timestep", "affinity"] = "snr"
    k: PositiveInt | Literal["auto"] = 5
    min_size: PositiveInt | None = None
    max_size: PositiveInt | None = None
    affinity: str | None = None
    clip: list[Number] | None = None


@dataclass(frozen=True)
class Timesteps:
    """How timesteps are drawn where no curriculum does it.

    Attributes:
        sampler: distribution; null for uniform with vanilla, stratified by cluster with the other methods. Of
            continuous levels: log_normal or laplace for EDM (null: log_normal), logit_normal, mode, beta or
            laplace for flow matching (null: uniform), from which batches are drawn uniformly or by cluster alike
        args: its arguments: mean, std, also as logit_mean, logit_std (logit_normal; log_normal, EDM's P_mean and
            P_std), mode_scale (mode), a, b (beta), mean, scale of the log-SNR (laplace), suppression, least_change
            (speed), min_timestep, max_timestep or ranges of [step, first, end] (range), cells, history,
            uniform_share (second_moment), cells, decay, power, uniform_share (loss)
        interval: first timestep and end of those to train on alone, an expert for them (vanilla); null for all
    """

    sampler: SamplerName | None = None
    args: dict[str, Any] = field(default_factory=dict)
    interval: list[NonNegativeInt] | None = None


@dataclass(frozen=True)
class Curriculum:
    """Phases: training begins with one cluster of timesteps and adds the next when the loss stops improving.

    Attributes:
        order: the noisiest timesteps first (easy_to_hard), the least noisy first (hard_to_easy), or all at once
        clusters: Clusters that the phases add
        patience: iterations without a new lowest loss that end a phase; null for phases of max_length
        max_length: most iterations of a phase, or of each of them; null for no limit
        smoothing: weight of the past in a moving average of the loss, 0 up to 1; 0 for the loss itself
        min_delta: least fall of the loss that counts
        sampling: uniform in the union of the phase, equal numbers per cluster of the phase, or per task; null for
            union with vanilla, tasks with the other methods
    """

    order: Literal["none", "easy_to_hard", "hard_to_easy"] = "none"
    clusters: Clusters = field(default_factory=lambda: Clusters(k=20))
    patience: PositiveInt | None = 200
    max_length: PositiveInt | list[PositiveInt] | None = None
    smoothing: UnitFloat = 0.0
    min_delta: NonNegativeFloat = 0.0
    sampling: Literal["union", "clusters", "tasks"] | None = None


@dataclass(frozen=True)
class Loss:
    """The loss of a sample: mean squared error times a weight by noise level, before clusters are balanced.

    Attributes:
        weight: Min-SNR, P2 and others, for what the model predicts; docs/loss-weighting.md has the formulas
        args: its arguments: gamma, also as snr_gamma or min_snr_gamma (min_snr, soft_min_snr; default 5), gamma
            and k (p2), sigma_data (edm), logit_mean and logit_std (logit_normal), mode_scale (mode)
        nonfinite: stop training where a loss is not finite, or drop its cluster from the step and count it in the
            log, which methods that balance clusters can
    """

    weight: Literal[
        "none",
        "min_snr",
        "soft_min_snr",
        "p2",
        "debiased",
        "edm",
        "truncated_snr",
        "logit_normal",
        "mode",
        "cosmap",
        "sigma_sqrt",
    ] = "none"
    args: dict[str, Any] = field(default_factory=dict)
    nonfinite: Literal["stop", "drop"] = "stop"


@dataclass(frozen=True)
class Conditioning:
    """How the conditions of the data (classes, captions, embeddings) reach the model.

    Attributes:
        enabled: without it the model is called without them
        dropout: share of the samples that lose their condition in training, for guidance; classes then need one
            embedding more than there are classes
        encoder: folder of a text encoder of transformers and its tokenizer, for captions
        max_length: tokens of a caption
        argument: of the model; null for class_labels or encoder_hidden_states
        mask: argument of the model for the mask of a caption's tokens; null for none
    """

    enabled: bool = True
    dropout: UnitFloat = 0.0
    encoder: str | None = None
    max_length: PositiveInt = 77
    argument: str | None = None
    mask: str | None = None


@dataclass(frozen=True)
class Optimizer:
    """AdamW; what a method learns has a group of its own (learning rate 0.025, no weight decay).

    Attributes:
        lr: learning rate of the model
        warmup: iterations over which all learning rates rise from 0
        schedule: of the learning rates after that, down to 0 at the last iteration unless constant
        weight_decay: decoupled weight decay
        clip: largest norm of the gradient, 0 for no clipping; null for the method's own, most have none
    """

    lr: PositiveFloat = 1e-4
    warmup: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegativeFloat = 0.0
    clip: NonNegativeFloat | None = None


@dataclass(frozen=True)
class Compute:
    """How the model is run and the gradients of the clusters are formed.

    Attributes:
        engine: of ClusteredMTL; auto chooses, and the log says what
        memory: full keeps the gradients of all clusters, lean does with less
        jacobian_dtype: of the kept gradients; null for the parameters' own
        compile: torch.compile of the model
        checkpointing: recompute activations in the backward; of models that offer it
        channels_last: memory layout of convolutions
        sharding: fsdp2 shards the model, its averages and the optimizer over the processes (fully_shard)
        weights: safetensors file of weights to start from; null for random ones
        lora: rank of low-rank adapters (peft) that are trained in place of the weights; 0 for none
        lora_targets: names of the modules that get adapters
    """

    engine: Literal["auto", "grouped", "sliced"] = "auto"
    memory: Literal["full", "lean"] = "full"
    jacobian_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    compile: bool = False
    checkpointing: bool = False
    channels_last: bool = False
    sharding: Literal["none", "fsdp2"] = "none"
    weights: str | None = None
    lora: NonNegativeInt = 0
    lora_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn from the EMA weights.

    Attributes:
        scheduler: Sampler, on the noise schedule of training; auto: DDIM for timesteps, else the scheduler itself
        steps: denoising steps per picture
        batch_size: pictures denoised at a time
        guidance: scale of classifier-free guidance; 1 for none
        sigma_rel: relative width of the power EMA to draw from, of a run with sigma_rels; null for the EMA of
            ema_decay
    """

    scheduler: Component = field(default_factory=lambda: Component("auto"))
    steps: Size = 50
    batch_size: Size = 360
    guidance: NonNegativeFloat = 1.0
    sigma_rel: PositiveFloat | None = None


@dataclass(frozen=True)
class Evaluation:
    """Metrics of drawn pictures at the end, and the loss on held-out samples during training.

    Attributes:
        num_samples: pictures drawn for the metrics, in equal numbers per class; 0 for no evaluation
        features: Features of pictures float32 [N, C, H, W] in [-1, 1], a function or module; auto: those of a
            classifier trained on the real pictures; diffmtl_fast.analysis.Inception: those of FID
        num_real: most real pictures that others are compared with
        validation_every: iterations between two measurements of every cluster's loss on held-out samples at fixed
            noise, with the averaged weights; 0 for none
        validation_samples: how many
    """

    num_samples: SizeOrZero = 360
    features: Component = field(default_factory=lambda: Component("auto"))
    num_real: PositiveInt = 10_000
    validation_every: NonNegativeInt = 0
    validation_samples: Size = 256


@dataclass(frozen=True)
class Logging:
    """What goes to log.jsonl and TensorBoard.

    Attributes:
        every: iterations per line (each line holds their mean)
        cosines_every: iterations between two measurements of the cosines of the clusters' gradients; 0 for none
        tensorboard: also write TensorBoard event files
        wandb: project of Weights & Biases to log to as well; null for none
        pictures_every: iterations between two drawings of pictures for TensorBoard and the like; 0 for none
    """

    every: PositiveInt = 10
    cosines_every: NonNegativeInt = 20
    tensorboard: bool = True
    wandb: str | None = None
    pictures_every: NonNegativeInt = 0


@dataclass(frozen=True)
class Checkpoints:
    """When the state of training goes to disk.

    Attributes:
        every: iterations between two checkpoints
        keep: how many to keep
    """

    every: PositiveInt = 100
    keep: PositiveInt = 2


_Class = TypeVar("_Class", bound=type)


def _with_methods(cls: _Class) -> _Class:
    """Give a class the choice of methods and, as ``NAME_OPTION``, the options of each, all from the registry."""
    cls.__annotations__["method"] = Literal[(PLAIN, CONTINUOUS, *METHODS)]
    lines = []
    for method in METHODS.values():
        for option in method.options:
            name = f"{method.name}_{option.name}"
            cls.__annotations__[name] = bounded(option.type)
            setattr(cls, name, option.default)
            lines.append(f"        {name}: {option.about} ({method.name})\n")
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n{''.join(lines)}    "
    return cls


@dataclass(frozen=True)
@_with_methods
class Config:
    """A training run.

    Attributes:
        method: how the clusters are balanced; vanilla: not at all; continuous_uw: every noise level by itself
        iterations: optimizer steps
        batch_size: images per backward pass
        accumulate: backward passes per optimizer step
        weigh_per: what the method weighs where there are several: every batch by itself, or all of a step as one,
            which takes the memory of the Jacobian and makes batches of a few samples useful
        ema_decay: decay per step of the averaged weights
        sigma_rels: relative widths of power EMAs that are snapshot at every checkpoint, such as [0.05, 0.1], from
            which sampling.sigma_rel makes any other after training; [] for none
        precision: of the forward pass; bf16 and fp16 are autocast, the weights stay fp32; fp16 with a GradScaler
        device: auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
        seed: of the weights, the data order, the noise and the pictures
        clusters: Clusters of timesteps, the tasks
        timesteps: Timesteps of a batch
        curriculum: Curriculum, easy timesteps first
        loss: Loss of a sample
        model: Model, called with (x, t) and the conditions
        scheduler: Noise process, by a diffusers scheduler; with discrete timesteps, of EDM or of flow matching
        data: Data, a function that returns ImageData or FileData of diffmtl_fast.data
        workers: processes that read data ahead
        unreadable: most files that may be left out because they cannot be read; each is named
        conditioning: Conditions of the samples
        optimizer: Optimizer, AdamW
        compute: Running the model
        sampling: Drawing pictures
        evaluation: Metrics at the end of training
        logging: Logs, log.jsonl and TensorBoard
        checkpoints: Checkpoints
    """

    method: str = "uw"
    iterations: PositiveInt = 1000
    batch_size: Size = 128
    accumulate: PositiveInt = 1
    weigh_per: Literal["batch", "step"] = "batch"
    ema_decay: UnitFloat = 0.9999
    sigma_rels: list[PositiveFloat] = field(default_factory=list)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    seed: Seed = 0
    clusters: Clusters = field(default_factory=Clusters)
    timesteps: Timesteps = field(default_factory=Timesteps)
    curriculum: Curriculum = field(default_factory=Curriculum)
    loss: Loss = field(default_factory=Loss)
    model: Component = field(default_factory=Component)
    scheduler: Component = field(default_factory=Component)
    data: Component = field(default_factory=Component)
    workers: Workers = 0
    unreadable: NonNegativeInt = 100
    conditioning: Conditioning = field(default_factory=Conditioning)
    optimizer: Optimizer = field(default_factory=Optimizer)
    compute: Compute = field(default_factory=Compute)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    logging: Logging = field(default_factory=Logging)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    @classmethod
    def names(cls) -> list[str]:
        """Names of the options at the top level."""
        return [item.name for item in fields(cls)]

    @property
    def clip(self) -> float:
        """The largest gradient norm in force, 0 for none."""
        if self.optimizer.clip is not None:
            return self.optimizer.clip
        return METHODS[self.method].clip if self.balanced else 0.0

    @property
    def balanced(self) -> bool:
        """Whether the method balances clusters."""
        return self.method in METHODS

    def method_options(self) -> dict[str, Any]:
        """The options of the method in force, for `Method.build`."""
        options = METHODS[self.method].options if self.balanced else ()
        return {option.name: getattr(self, f"{self.method}_{option.name}") for option in options}


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of YAML's own types."""
    return asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Build and check a configuration.

    Args:
        values: nested dictionaries as :func:`to_dict` makes them; what is left out has its default.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    with blame("config", (Exception,)):
        _check_names(Config, values, "")
        try:
            typed = _types().parse_object(values).as_dict()
        except require("jsonargparse", "train").ArgumentError as error:
            raise UserError(readable(str(error))) from error
    return check(_build(Config, typed, values))


@functools.cache
def _types() -> Any:
    """A parser that knows the types of all options."""
    parser = require("jsonargparse", "train").ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    return parser


def read(path: Path) -> Config:
    """Read a YAML file that holds a configuration.

    Raises:
        UserError: the file is not YAML or holds no configuration.
    """
    return from_dict(read_values(path))


def read_values(path: Path) -> dict[str, Any]:
    """The options in a YAML file, unchecked.

    Raises:
        UserError: the file cannot be read or is not a mapping in YAML.
    """
    import yaml

    from .yaml_text import check_text

    try:
        text = path.read_text(encoding="utf-8")
        check_text(text, str(path))
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected YAML ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options, found {type(values).__name__}")
    return values


def digits() -> dict[str, Any]:
    """The bundled configuration: scikit-learn's handwritten digits in a few minutes on two CPU cores."""
    import yaml

    return yaml.safe_load(files("diffmtl_fast.train").joinpath("configs/digits.yaml").read_text())


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """The options in which two configurations differ: both values by dotted name."""
    left, right = _flatten(to_dict(ours)), _flatten(to_dict(theirs))
    both = {key: (left.get(key), right.get(key)) for key in sorted(left.keys() | right.keys())}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def changed(config: Config, saved: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option that training depends on and that has changed: its name, the old and the new value.

    Args:
        config: as it is now.
        saved: as `to_dict` made it; options that it does not have, or has no more, are not compared.
    """
    now, then = _flatten(to_dict(config)), _flatten(saved)
    for key in sorted(now.keys() & then.keys()):
        if now[key] != then[key] and not key.startswith(FREE_ON_RESUME):
            return key, then[key], now[key]
    return None


def _check_names(cls: Any, values: Mapping[str, Any], prefix: str) -> None:
    types = get_type_hints(cls)
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{prefix}{name}: unknown option; expected one of {', '.join(types)}")
        if is_dataclass(types[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{name}: expected a mapping of options, found {value!r}")
            _check_names(types[name], value, f"{prefix}{name}.")


def _build(cls: Any, typed: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """An object of a class; dictionaries as they were given, since jsonargparse reads strings in them as YAML."""
    types, arguments = get_type_hints(cls), {}
    for name, value in typed.items():
        if value is None and type(None) not in get_args(types[name]):
            raise UserError(f"{name}: expected a value, found null")
        if is_dataclass(types[name]):
            value = _build(types[name], value, given.get(name, {}))
        else:
            value = plain(value)
        arguments[name] = given.get(name, value) if isinstance(value, dict) else value
    return cls(**arguments)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            # YAML has no tuples: (48, 96) and [48, 96] are the same setting.
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def check(config: Config) -> Config:
    """Check what types cannot say: how options fit each other.

    Raises:
        UserError: they do not.
    """
    for key, widths in (("sigma_rels", config.sigma_rels), ("sampling", [config.sampling.sigma_rel])):
        for width in filter(None, widths):
            with blame(key):
                exponent(width)
    for fits, key, expected, found in _rules(config):
        if not fits:
            raise UserError(f"{key}: expected {expected}, found {found}")
    return config


def _rules(config: Config) -> Iterator[tuple[bool, str, str, Any]]:
    """Whether options fit, the option that is at fault where they do not, and what was expected and found."""
    c, loss, interval, sigma_rel = config, config.loss, config.timesteps.interval, config.sampling.sigma_rel
    method, order, sampler = c.method, c.curriculum.order, c.timesteps.sampler
    yield not loss.args or loss.weight != "none", "loss.args", "none without a loss.weight", loss.args
    stop = f"stop with method {method}, which knows no clusters"
    yield loss.nonfinite == "stop" or c.balanced, "loss.nonfinite", stop, loss.nonfinite
    full = "batch with compute.memory lean, which keeps no Jacobian"
    yield c.weigh_per == "batch" or c.compute.memory == "full", "weigh_per", full, c.weigh_per
    if c.compute.sharding != "none":
        yield c.weigh_per == "batch", "weigh_per", "batch with compute.sharding", c.weigh_per
        yield c.precision != "fp16", "precision", "fp32 or bf16 with compute.sharding", c.precision
        yield not c.sigma_rels, "sigma_rels", "[] with compute.sharding", c.sigma_rels
    # While training, the first process alone looks, and no process of several in shards holds the averages.
    every, sinks = c.logging.every, c.logging.tensorboard or c.logging.wandb
    looks = {
        "evaluation.validation_every": c.evaluation.validation_every,
        "logging.pictures_every": c.logging.pictures_every,
    }
    for key, look in looks.items():
        yield not look or c.compute.sharding == "none", key, "0 with compute.sharding", look
        yield look % every == 0, key, f"a multiple of logging.every {every}", look
    nowhere = "0 without logging.tensorboard and logging.wandb"
    shown = c.logging.pictures_every
    yield not shown or bool(sinks), "logging.pictures_every", nowhere, shown
    kept = sigma_rel is None or len(set(c.sigma_rels)) > 1
    two = "null, or at least two sigma_rels that the run has kept"
    yield kept, "sampling.sigma_rel", two, f"{sigma_rel} with {c.sigma_rels}"
    few = c.evaluation.num_samples
    yield few not in range(1, NEIGHBOURS + 1), "evaluation.num_samples", f"0 or more than {NEIGHBOURS}", few
    real = c.evaluation.num_real
    yield not few or real > NEIGHBOURS, "evaluation.num_real", f"more than {NEIGHBOURS}", real
    for key, clusters in (("clusters", c.clusters), ("curriculum.clusters", c.curriculum.clusters)):
        clip, affinity, cost = clusters.clip, clusters.affinity, clusters.cost
        bounds = clip is None or (len(clip) == 2 and clip[0] < clip[1])
        yield bounds, f"{key}.clip", "[low, high] with low < high, or null", repr(clip)
        file = "a .npy or .json file with cost affinity and none with another cost"
        both = (cost == "affinity") == (affinity is not None)
        yield both, f"{key}.affinity", file, f"{affinity!r} with cost {cost}"
    drawn = "null with a curriculum, which draws the timesteps"
    yield order == "none" or sampler is None, "timesteps.sampler", drawn, repr(sampler)
    if interval is not None:
        inside = len(interval) == 2 and 0 <= interval[0] < interval[1]
        yield inside, "timesteps.interval", "[first, end] with 0 <= first < end", repr(interval)
        plain = method == PLAIN and order == "none" and sampler in (None, "uniform")
        alone = f"null, or method {PLAIN} without curriculum or sampler"
        found = f"{interval!r} with method {method}, curriculum {order}, sampler {sampler}"
        yield plain, "timesteps.interval", alone, found
    parts = {"model": c.model, "scheduler": c.scheduler, "data": c.data}
    choices = {"sampling.scheduler": c.sampling.scheduler, "evaluation.features": c.evaluation.features}
    parts |= {key: part for key, part in choices.items() if part.path != "auto"}
    for key, part in parts.items():
        yield "." in part.path, f"{key}.path", "an import path such as package.Class", repr(part.path)
