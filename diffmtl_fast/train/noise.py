"""The noise of a run: its process, and the levels that it is trained on, as T of them in order of their noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._published_names import rename
from ..clustering import (
    BetaTime,
    LaplaceSigma,
    LaplaceTime,
    LogitNormalTime,
    LogNormalSigma,
    ModeTime,
    NoiseDistribution,
    ShiftedTime,
    UniformTime,
)
from ..clustering.continuous import middle_levels
from ..diffusion import FlowMatching, NoiseProcess, loss_weight, noise_process
from ..diffusion import log_snr as scheduler_log_snr
from ..diffusion.processes import LossWeight
from .config import Config, Loss, Timesteps
from .errors import UserError, blame

# Distributions of continuous levels by the names that `timesteps.sampler` takes.
LAWS = ("logit_normal", "log_normal", "mode", "beta", "laplace")
# No schedule that keeps some signal and some noise comes near.
_UNBOUNDED = 1e12


class Noise:
    """A noise process with the levels of its training.

    Timesteps are 0 … T−1. Continuous levels are cut into T cells of equal probability in training, so that an
    interval of timesteps means the same for all processes: in experts, in affinities, on pictures.

    Args:
        config: of the run.
        scheduler: the diffusers scheduler that the process comes from.
        device: of the levels.

    Attributes:
        scheduler: as given.
        process: the noise process, with the loss weight of the configuration.
        distribution: of continuous levels; None for timesteps.
        num_timesteps: T.

    Raises:
        UserError: the scheduler, the loss weight or the distribution cannot be used.
    """

    def __init__(self, config: Config, scheduler: Any, device: torch.device | str = "cpu") -> None:
        self.scheduler = scheduler
        bounds = config.clusters.clip
        self._clip = None if bounds is None else (bounds[0], bounds[1])
        self.process = build_process(config.loss, scheduler, device)
        self.num_timesteps = self.process.num_timesteps
        self.distribution: NoiseDistribution | None = None
        levels = torch.arange(self.num_timesteps)
        if self.process.continuous:
            with blame("timesteps"):
                self.distribution = _distribution(config.timesteps, self.process, scheduler)
            levels = middle_levels(self.distribution, self.num_timesteps)
        self.levels = levels.to(device)
        weights = self.process.weight(self.levels)
        if weights is not None and not weights.max() < _UNBOUNDED:
            kind = scheduler.config.get("prediction_type", "epsilon")
            raise UserError(
                f"loss.weight: expected one that is bounded for prediction type {kind} on this schedule, found "
                f"{config.loss.weight}, which is {weights.max():.3g} at timestep {int(weights.argmax())}"
            )

    def at(self, timestep: Tensor) -> Tensor:
        """The levels of timesteps, same shape; of a cell its median."""
        return timestep if self.distribution is None else self.levels[timestep].float()

    def log_snr(self, clip: tuple[float, float] | None = None) -> NDArray[np.float64]:
        """The log-SNR at every timestep, float64 [T].

        Raises:
            ValueError: it is not finite somewhere and `clip` is not given.
        """
        if self.distribution is None:
            return scheduler_log_snr(self.scheduler, clip=clip)
        values = self.process.log_snr(self.levels).cpu().numpy()
        return values if clip is None else np.clip(values, *clip)

    def cluster_log_snr(self) -> NDArray[np.float64]:
        """The log-SNR that clusters are formed by, within the bounds that are configured."""
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


def build_process(loss: Loss, scheduler: Any, device: torch.device | str) -> NoiseProcess:
    """The process of a scheduler with a loss weight.

    Raises:
        UserError: the scheduler has none, or the weight does not take the arguments.
    """
    weight: LossWeight | None = None
    if loss.weight != "none":
        with blame("loss.args"):
            weight = _weight(loss)
            weight(torch.zeros(1))
    with blame("scheduler"):
        return noise_process(scheduler, device, weight)


def _weight(loss: Loss) -> LossWeight:
    return lambda log_snr: loss_weight(loss.weight, log_snr, **loss.args)


def _distribution(config: Timesteps, process: NoiseProcess, scheduler: Any) -> NoiseDistribution:
    """The distribution of continuous levels; times are shifted as the scheduler says."""
    name = config.sampler if config.sampler in LAWS else None
    args = config.args if name else {}
    if not isinstance(process, FlowMatching):
        if name in ("logit_normal", "mode", "beta"):
            raise ValueError(f"sampler: expected log_normal or laplace for EDM's σ, found {name}")
        return LaplaceSigma(**args) if name == "laplace" else LogNormalSigma(**args)
    shift = float(scheduler.config.get("shift", 1.0))
    if name == "log_normal":
        raise ValueError("sampler: expected logit_normal, mode, beta or laplace for times, found log_normal")
    if name in ("mode", "beta"):
        if shift != 1.0:
            raise ValueError(f"sampler: expected a scheduler with shift 1 for {name}, found {shift}")
        return ModeTime(**args) if name == "mode" else BetaTime(**args)
    if name == "logit_normal":
        law = LogitNormalTime(**rename(args, {"logit_mean": "mean", "logit_std": "std"}))
        return LogitNormalTime(law.mean + math.log(shift), law.std)
    if name == "laplace":
        laplace = LaplaceTime(**args)
        return LaplaceTime(laplace.mean - 2.0 * math.log(shift), laplace.scale)
    return UniformTime() if shift == 1.0 else ShiftedTime(shift)
