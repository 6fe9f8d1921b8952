"""Samplers by name, as a configuration gives them, and what each of them draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ..clustering import IntervalClustering, NoiseClustering
from ..clustering.distributions import LAWS, SIGMA_LAWS, TIME_LAWS, named_law
from ._levels import Clustering, cut
from .difficulty_curriculum import DifficultyCurriculum
from .loss_sampler import LossSampler
from .range_sampler import RangeSampler
from .samplers import DistributionSampler, StratifiedSampler, UniformSampler
from .second_moment import LossSecondMomentSampler
from .speed_sampler import SpeeDSampler
from .timestep_sampler import TimestepSampler

Array: TypeAlias = NDArray[np.float64]
SamplerName: TypeAlias = Literal[
    "uniform",
    "stratified",
    "logit_normal",
    "log_normal",
    "mode",
    "beta",
    "laplace",
    "speed",
    "range",
    "second_moment",
    "loss",
]
# Those that have nothing but tasks and arguments of their own.
_SAMPLERS: dict[str, type[TimestepSampler]] = {
    "uniform": UniformSampler,
    "stratified": StratifiedSampler,
    "second_moment": LossSecondMomentSampler,
    "loss": LossSampler,
    "range": RangeSampler,
}
# What is shown of samplers that have no defaults, as shares of T where they are timesteps.
_SHOWN_BETA = {"a": 1.5, "b": 1.0}
_SHOWN_RANGES = ((0, 0.5, 1.0), (1000, 0.2, 1.0), (2000, 0.0, 1.0))
# Rounds of losses that are shown to samplers that follow them.
_ROUNDS = 10


def named_sampler(
    name: str, tasks: Clustering, args: Mapping[str, Any], log_snr: Callable[[], Array]
) -> TimestepSampler:
    """The sampler of a name.

    Args:
        name: one of `SamplerName`.
        tasks: see `TimestepSampler`.
        args: its arguments; those of distributions also under the names of training scripts.
        log_snr: gives the log-SNR [T]; asked for only by samplers that need it, since a schedule that ends in pure
            noise has none that is finite.

    Raises:
        TypeError: it has no such argument.
        ValueError: an argument is out of range, or it draws timesteps alone and the levels are continuous.
    """
    if name in LAWS:
        law = named_law(TIME_LAWS | SIGMA_LAWS, name, args)
        return DistributionSampler(tasks, law, log_snr=log_snr() if name in SIGMA_LAWS else None)
    if name == "speed":
        if isinstance(tasks, NoiseClustering):
            raise ValueError("sampler: expected one of continuous noise levels, found speed")
        return SpeeDSampler(tasks, log_snr(), **args)
    return _SAMPLERS[name](tasks, **args)


def interval_sampler(clusters: Clustering, first: int, end: int, num_timesteps: int) -> UniformSampler:
    """Draws from one interval alone, which trains an expert of it.

    Args:
        clusters: of the levels.
        first: the interval's first timestep.
        end: one past its last.
        num_timesteps: T; of continuous levels, the cells of equal probability that timesteps stand for.

    Raises:
        ValueError: the interval reaches beyond T.
    """
    if end > num_timesteps:
        raise ValueError(f"expected an end of at most {num_timesteps}, found {end}")
    bounds = np.unique([0, first, end, num_timesteps])
    return UniformSampler(cut(clusters, bounds / num_timesteps), only=int(np.searchsorted(bounds, first)))


def all_densities(clusters: IntervalClustering, log_snr: Array) -> dict[str, dict[str, Array]]:
    """The probabilities [T] of all samplers by name, and under it by what they depend on.

    Samplers that follow losses are shown after those of the best denoiser of white noise, SNR / (1 + SNR).

    Args:
        clusters: the tasks, and the clusters of the curriculum.
        log_snr: [T].

    Raises:
        ValueError: there is one timestep alone.
    """
    number = clusters.num_timesteps
    if number < 2:
        raise ValueError(f"expected at least 2 timesteps, found {number}")
    ranges = [[step, *(round(number * share) for share in ends)] for step, *ends in _SHOWN_RANGES]
    arguments: dict[str, dict[str, Any]] = {"beta": _SHOWN_BETA, "range": {"ranges": ranges}}
    t = torch.arange(number)
    found: dict[str, dict[str, Array]] = {}
    for name in get_args(SamplerName):
        sampler = named_sampler(name, clusters, arguments.get(name, {}), lambda: log_snr)
        if isinstance(sampler, RangeSampler):
            found[name] = {}
            for step in sampler.starts:
                sampler.steps = step
                found[name][f"from step {step}"] = sampler.density(t).numpy()
            continue
        for _ in range(_ROUNDS if sampler.follows_losses else 0):
            sampler.update(torch.sigmoid(torch.from_numpy(log_snr)), t)
        found[name] = {"": sampler.density(t).numpy()}
    curriculum = DifficultyCurriculum(clusters)
    found["curriculum"] = {}
    for phase in range(1, clusters.k + 1):
        curriculum.current_phase.fill_(phase)
        found["curriculum"][f"phase {phase}"] = curriculum.density(t).numpy()
    return found
