"""Noise processes: how noise is mixed in, what a model is called with, and what it is to predict.

All three members are of one form. The noisy input is x = α x_0 + σ ε, the target a x_0 + b ε, with four numbers
that depend on the noise level. Levels are drawn by clusterings and samplers: timesteps 0 … T−1 by those of
`cluster_snr` and its like, continuous ones by those of `cluster_noise`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..ops.denoising_loss import Prediction
from .loss_weights import predicted_weight
from .snr import log_snr

#: The weight of the squared error of ε, as a function of the log-SNR.
LossWeight: TypeAlias = Callable[[Tensor], Tensor]

#: diffusers' names of what a model predicts, to those of `ops.denoising_loss`.
PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}

# log-SNR that stands for pure signal, and negative for pure noise: its exponential is finite in float32.
_REACH = 80.0


class NoiseProcess(ABC):
    """What training has to know of a noise process; every method works sample by sample and reads nothing back.

    Args:
        num_timesteps: T, timesteps of a discrete process; the unit of time that the model of flow matching sees.
        loss_weight: the weight of the squared error of ε by log-SNR; the weight of what the model predicts follows
            from it. Default: 1 for the error of what the model predicts.
    """

    continuous: ClassVar[bool] = True
    _fused: Prediction = "v"  # a target of any two shares

    def __init__(self, num_timesteps: int, loss_weight: LossWeight | None = None) -> None:
        self.num_timesteps = num_timesteps
        self.loss_weight = loss_weight

    @abstractmethod
    def log_snr(self, level: Tensor) -> Tensor:
        """ln(α² / σ²) of noise levels, float32 at least, same shape."""

    @abstractmethod
    def shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of noise levels [B], the shares of image and noise in the noisy input; each [B]."""

    @abstractmethod
    def target_shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of noise levels [B], the shares of image and noise in the target; each [B]."""

    @abstractmethod
    def model_time(self, level: Tensor) -> Tensor:
        """What the model is told of noise levels, same shape; rises with the noise."""

    @abstractmethod
    def predicted_weight(self, weight: Tensor, log_snr: Tensor) -> Tensor:
        """The weight of the predicted quantity's error that a weight of ε's error comes to, same shape."""

    def noisy(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Noisy inputs α x_0 + σ ε.

        Args:
            x0: floating point [B, ...].
            noise: likewise.
            level: [B], on the same device.

        Returns:
            [B, ...] in the dtype of `x0`.
        """
        return ops.add_noise(x0, noise, *self.shares(level))

    def inputs(self, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The first two arguments of the model: the noisy input [B, ...] and the time [B]."""
        return noisy, self.model_time(level)

    def target(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the model is to predict, [B, ...]; `loss` forms it on the way instead."""
        return ops.add_noise(x0, noise, *self.target_shares(level))

    def weight(self, level: Tensor) -> Tensor | None:
        """The weight of every sample's squared error, [B]; None for 1."""
        if self.loss_weight is None:
            return None
        levels = self.log_snr(level)
        return self.predicted_weight(self.loss_weight(levels), levels)

    def loss(self, pred: Tensor, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The weighted mean squared error of every sample against its target.

        Args:
            pred: floating point [B, ...], what the model returned.
            x0: as given to `noisy`.
            noise: likewise.
            level: likewise.

        Returns:
            [B], float32 at least.
        """
        a, b = self.target_shares(level) if self._fused == "v" else (None, None)
        return ops.denoising_loss(
            pred,
            x0,
            noise,
            prediction=self._fused,
            alpha=b,
            sigma=None if a is None else -a,
            weight=self.weight(level),
        )


class DiscreteVP(NoiseProcess):
    """α = √ᾱ_t, σ = √(1 − ᾱ_t) with timesteps t = 0 … T−1; the model predicts ε, x_0 or v and is told t.

    Sources: Ho et al., NeurIPS 2020, arXiv 2006.11239; Salimans & Ho, ICLR 2022, arXiv 2202.00512 (v).

    The tables of all timesteps are put on the device once: a step gathers those of its samples and nothing crosses
    from the host, as it does in a scheduler's own ``add_noise``, which is not called. A schedule that ends in pure
    noise (zero-terminal SNR) is fine with v and x_0.

    Args:
        scheduler: its ``alphas_cumprod`` [T] is the forward process, its ``prediction_type`` says what the model
            predicts: "epsilon" (the default), "v_prediction" or "sample".
        device: of the tables and of all that is given to the methods.
        loss_weight: see `NoiseProcess`.

    Attributes:
        weights: of the squared error at every timestep, float32 [T] on the device; None for 1.

    Raises:
        ValueError: the prediction type is another.
    """

    continuous = False

    def __init__(
        self, scheduler: Any, device: torch.device | str = "cpu", loss_weight: LossWeight | None = None
    ) -> None:
        super().__init__(len(scheduler.alphas_cumprod), loss_weight)
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction_type: expected epsilon, v_prediction or sample, found {kind!r}")
        self._kind, self._fused = kind, PREDICTIONS[kind]
        signal = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32, device=device)
        self._shares = torch.stack([signal, 1.0 - signal]).sqrt()
        # At pure noise and pure signal the limits are wanted: not infinity times zero.
        levels = torch.from_numpy(log_snr(scheduler, clip=(-_REACH, _REACH)))
        self._log_snr = torch.from_numpy(log_snr(scheduler, clip=(-torch.inf, torch.inf))).float().to(device)
        self.weights = None
        if loss_weight is not None:
            self.weights = self.predicted_weight(loss_weight(levels), levels).float().to(device)

    def log_snr(self, level: Tensor) -> Tensor:
        """ln(ᾱ_t / (1 − ᾱ_t)), float32; infinite at pure signal and pure noise."""
        return self._log_snr[level]

    def shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), float32 [B] each."""
        alpha, sigma = self._shares[:, level]
        return alpha, sigma

    def target_shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """0 and 1 for ε, 1 and 0 for x_0, −σ and α for v."""
        alpha, sigma = self.shares(level)
        if self._kind == "v_prediction":
            return -sigma, alpha
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        return (one, zero) if self._kind == "sample" else (zero, one)

    def model_time(self, level: Tensor) -> Tensor:
        """t itself."""
        return level

    def predicted_weight(self, weight: Tensor, log_snr: Tensor) -> Tensor:
        """See `diffmtl_fast.diffusion.predicted_weight`."""
        return predicted_weight(weight, log_snr, self._kind)

    def weight(self, level: Tensor) -> Tensor | None:
        """From the table."""
        return None if self.weights is None else self.weights[level]


class EDM(NoiseProcess):
    """x = x_0 + σ ε with σ in (0, ∞), and a network F whose input and output have variance 1.

    The denoiser is D(x) = c_skip x + c_out F(c_in x, ln(σ) / 4) with c_skip = σ_data² / (σ² + σ_data²), c_out = σ
    σ_data / √(σ² + σ_data²), c_in = 1 / √(σ² + σ_data²). EDM's loss weight λ = 1 / c_out² of D's error is weight 1
    of the error of F. Source: Karras et al., NeurIPS 2022, arXiv 2206.00364.

    Args:
        sigma_data: standard deviation of the data, positive.
        num_timesteps: cells of equal probability that analyses divide the levels into.
        loss_weight: see `NoiseProcess`.

    Raises:
        ValueError: ``sigma_data`` is not positive.
    """

    def __init__(
        self, sigma_data: float = 0.5, num_timesteps: int = 1000, loss_weight: LossWeight | None = None
    ) -> None:
        super().__init__(num_timesteps, loss_weight)
        if not sigma_data > 0:
            raise ValueError(f"sigma_data: expected a positive number, found {sigma_data}")
        self.sigma_data = sigma_data

    def log_snr(self, level: Tensor) -> Tensor:
        """−2 ln σ."""
        return -2.0 * level.log()

    def shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """1 and σ."""
        return torch.ones_like(level), level

    def target_shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Of F's target (x_0 − c_skip x) / c_out: c_in σ / σ_data and −c_in σ_data."""
        scale = self._scale(level)
        return scale * level / self.sigma_data, -scale * self.sigma_data

    def model_time(self, level: Tensor) -> Tensor:
        """ln(σ) / 4."""
        return 0.25 * level.log()

    def inputs(self, noisy: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x and ln(σ) / 4."""
        scale = self._scale(level).to(noisy.dtype)
        return noisy * scale.view(-1, *[1] * (noisy.dim() - 1)), self.model_time(level)

    def predicted_weight(self, weight: Tensor, log_snr: Tensor) -> Tensor:
        """‖Δε‖² = ‖Δx_0‖² / σ² = ‖ΔF‖² σ_data² / (σ² + σ_data²)."""
        return weight / (1.0 + torch.exp(-log_snr) / self.sigma_data**2)

    def _scale(self, level: Tensor) -> Tensor:
        """c_in."""
        return (level.square() + self.sigma_data**2).rsqrt()


class FlowMatching(NoiseProcess):
    """x = (1 − t) x_0 + t ε with t in (0, 1); the model predicts the velocity ε − x_0 and is told T t.

    Sources: Lipman et al., ICLR 2023, arXiv 2210.02747; Esser et al., ICML 2024, arXiv 2403.03206.

    Args:
        num_timesteps: T, 1000 for models of diffusers.
        loss_weight: see `NoiseProcess`.
    """

    _fused = "velocity"

    def __init__(self, num_timesteps: int = 1000, loss_weight: LossWeight | None = None) -> None:
        super().__init__(num_timesteps, loss_weight)

    def log_snr(self, level: Tensor) -> Tensor:
        """2 ln((1 − t) / t)."""
        return 2.0 * (torch.log1p(-level) - level.log())

    def shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """1 − t and t."""
        return 1.0 - level, level

    def target_shares(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """−1 and 1."""
        return -torch.ones_like(level), torch.ones_like(level)

    def model_time(self, level: Tensor) -> Tensor:
        """T t."""
        return self.num_timesteps * level

    def predicted_weight(self, weight: Tensor, log_snr: Tensor) -> Tensor:
        """See `diffmtl_fast.diffusion.predicted_weight`."""
        return predicted_weight(weight, log_snr, "flow_prediction")


def noise_process(
    scheduler: Any, device: torch.device | str = "cpu", loss_weight: LossWeight | None = None
) -> NoiseProcess:
    """The process of a diffusers scheduler; nothing of diffusers is imported, the attributes decide.

    Args:
        scheduler: one with ``alphas_cumprod`` (DDPM, DDIM, …) is `DiscreteVP`, with ``scale_noise`` (the
            flow-matching ones) `FlowMatching`, with ``sigma_data`` (the EDM ones) `EDM`.
        device: where timesteps will be.
        loss_weight: see `NoiseProcess`.

    Raises:
        TypeError: it is none of these.
        ValueError: the scheduler's settings are no process of training.
    """
    config = getattr(scheduler, "config", None)
    if config is not None and getattr(scheduler, "alphas_cumprod", None) is not None:
        return DiscreteVP(scheduler, device, loss_weight)
    if config is not None and hasattr(scheduler, "scale_noise"):
        return FlowMatching(config.num_train_timesteps, loss_weight)
    if config is not None and "sigma_data" in config:
        if config.get("prediction_type", "epsilon") != "epsilon":  # diffusers' name of F as it is here
            raise ValueError(f"prediction_type: expected epsilon, found {config.prediction_type!r}")
        return EDM(config.sigma_data, config.num_train_timesteps, loss_weight)
    raise TypeError(
        "expected alphas_cumprod, scale_noise or a sigma_data, and a config, found none on "
        f"{type(scheduler).__name__}"
    )
