"""A noise process with the levels of its training, as T of them in order of their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..clustering import (
    LaplaceTime,
    LogitNormalTime,
    LogNormalSigma,
    NoiseDistribution,
    ShiftedTime,
    UniformTime,
)
from ..clustering.continuous import middle_levels
from ..clustering.distributions import SIGMA_LAWS, TIME_LAWS, named_law
from .processes import FlowMatching, NoiseProcess
from .snr import log_snr


class TrainingNoise:
    """A noise process with the levels of its training.

    Timesteps are 0 … T−1. Continuous levels are cut into T cells of equal probability, so that an interval of
    timesteps means the same for all processes: in experts, in affinities, on pictures.

    Args:
        process: the noise process.
        scheduler: the diffusers scheduler that it comes from.
        distribution: of continuous levels; None for timesteps.
        clip: bounds of the log-SNR that clusters are formed by; None for none.
        device: of the levels.

    Attributes:
        scheduler, process, distribution: as given.
        num_timesteps: T.
        levels: the timesteps, or the medians of the cells, [T].
    """

    def __init__(
        self,
        process: NoiseProcess,
        scheduler: Any,
        distribution: NoiseDistribution | None = None,
        clip: tuple[float, float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.scheduler, self.process, self.distribution = scheduler, process, distribution
        self.num_timesteps, self._clip = process.num_timesteps, clip
        levels = torch.arange(self.num_timesteps)
        if distribution is not None:
            levels = middle_levels(distribution, self.num_timesteps)
        self.levels = levels.to(device)

    def at(self, timestep: Tensor) -> Tensor:
        """The levels of timesteps, same shape; of a cell its median."""
        return timestep if self.distribution is None else self.levels[timestep].float()

    def log_snr(self, clip: tuple[float, float] | None = None) -> NDArray[np.float64]:
        """The log-SNR at every timestep, float64 [T].

        Raises:
            ValueError: it is not finite somewhere and `clip` is not given.
        """
        if self.distribution is None:
            return log_snr(self.scheduler, clip=clip)
        values = self.process.log_snr(self.levels).cpu().numpy()
        return values if clip is None else np.clip(values, *clip)

    def cluster_log_snr(self) -> NDArray[np.float64]:
        """The log-SNR that clusters are formed by, within the bounds."""
        return self.log_snr(self._clip)

    @property
    def last_time(self) -> float:
        """What the model is told of the noisiest timestep."""
        return self.process.model_time(self.levels[-1]).item()

    def model_times(self, timesteps: NDArray[np.int64]) -> NDArray[np.float64]:
        """What the model is told of boundaries 0 … T between timesteps, same shape."""
        if self.distribution is None:
            return timesteps.astype(np.float64)
        share = torch.from_numpy(timesteps / self.num_timesteps)
        return self.process.model_time(self.distribution.quantile(share)).numpy()


def level_distribution(
    process: NoiseProcess, name: str | None, args: Mapping[str, Any], shift: float = 1.0
) -> NoiseDistribution:
    """The distribution of the continuous levels of a process.

    Args:
        process: EDM or flow matching.
        name: one of `TIME_LAWS` or `SIGMA_LAWS`; by default log-normal for EDM's σ and uniform for times.
        args: of the distribution, also under the names of training scripts.
        shift: of times, s t / (1 + (s − 1) t), as diffusers' schedulers have it.

    Raises:
        ValueError: the process has no such distribution, or it cannot be shifted.
        TypeError: it has no such argument.
    """
    times = isinstance(process, FlowMatching)
    laws, levels = (TIME_LAWS, "times") if times else (SIGMA_LAWS, "EDM's σ")
    if name is None:
        if not times:
            return LogNormalSigma()
        return UniformTime() if shift == 1.0 else ShiftedTime(shift)
    if name not in laws:
        *most, last = laws
        raise ValueError(f"sampler: expected {', '.join(most)} or {last} for {levels}, found {name}")
    law = named_law(laws, name, args)
    if not times or shift == 1.0:
        return law
    if name == "logit_normal":
        return LogitNormalTime(law.mean + math.log(shift), law.std)
    if name == "laplace":
        return LaplaceTime(law.mean - 2.0 * math.log(shift), law.scale)
    raise ValueError(f"sampler: expected a scheduler with shift 1 for {name}, found {shift}")
