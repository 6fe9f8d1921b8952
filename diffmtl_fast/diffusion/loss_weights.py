"""Loss weights as functions of the log-SNR: for ε-prediction, and what they come to for other predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._mode_time import check_mode_scale, mode_density
from .._published_names import rename
from .snr import log_snr

# log-SNR that stands for pure signal, and negative for pure noise: its exponential is finite in float32.
_REACH = 80.0
# No schedule that keeps some signal and some noise comes near.
_UNBOUNDED = 1e12


def min_snr_weight(log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR-γ: min(SNR, γ) / SNR (Hang et al., ICCV 2023, arXiv 2303.09556).

    Args:
        log_snr: any shape; infinities are allowed.
        gamma: SNR above which the weight falls, positive.

    Returns:
        Weights in [0, 1], same shape, dtype and device.

    Raises:
        ValueError: ``gamma`` is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma: expected a positive number, found {gamma}")
    return (gamma * torch.exp(-log_snr)).clamp(max=1.0)


def p2_weight(log_snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """P2: (k + SNR)^−γ (Choi et al., CVPR 2022, arXiv 2204.00227).

    Args:
        log_snr: any shape; infinities are allowed.
        gamma: strength, at least 0.
        k: offset that bounds the weight at high noise, positive.

    Returns:
        Weights in [0, k^−γ], same shape, dtype and device.

    Raises:
        ValueError: ``gamma`` is negative or ``k`` is not positive.
    """
    if gamma < 0 or not k > 0:
        raise ValueError(f"expected gamma >= 0 and k > 0, found gamma={gamma}, k={k}")
    return (k + torch.exp(log_snr)) ** -gamma


def soft_min_snr_weight(log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Soft Min-SNR-γ: γ / (SNR + γ), Min-SNR without its kink (Crowson et al., ICML 2024, arXiv 2401.11605).

    Args:
        log_snr: any shape; infinities are allowed.
        gamma: SNR around which the weight falls, positive.

    Returns:
        Weights in [0, 1], same shape, dtype and device.

    Raises:
        ValueError: ``gamma`` is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma: expected a positive number, found {gamma}")
    return torch.sigmoid(math.log(gamma) - log_snr)


def debiased_weight(log_snr: Tensor) -> Tensor:
    """Debiased estimation: 1 / √SNR (Yu et al., 2023, arXiv 2310.08442).

    Args:
        log_snr: any shape.

    Returns:
        Weights, same shape, dtype and device; without a bound at high noise.
    """
    return torch.exp(-0.5 * log_snr)


def edm_weight(log_snr: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM: λ(σ) = (σ² + σ_data²) / (σ σ_data)² of the error of x_0.

    With SNR = 1 / σ² that is SNR + 1 / σ_data², hence 1 + 1 / (σ_data² SNR) of the error of ε. Source: Karras et
    al., NeurIPS 2022, arXiv 2206.00364.

    Args:
        log_snr: any shape.
        sigma_data: standard deviation of the data, positive.

    Returns:
        Weights of at least 1, same shape, dtype and device; without a bound at high noise.

    Raises:
        ValueError: ``sigma_data`` is not positive.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data: expected a positive number, found {sigma_data}")
    return 1.0 + torch.exp(-log_snr) / sigma_data**2


def truncated_snr_weight(log_snr: Tensor) -> Tensor:
    """Truncated SNR: max(SNR, 1) of the error of x_0, max(1, 1 / SNR) of that of ε.

    Source: Salimans and Ho, "Progressive Distillation", ICLR 2022, arXiv 2202.00512.

    Args:
        log_snr: any shape.

    Returns:
        Weights of at least 1, same shape, dtype and device; without a bound at high noise.
    """
    return torch.exp(-log_snr).clamp(min=1.0)


def logit_normal_weight(log_snr: Tensor, logit_mean: float = 0.0, logit_std: float = 1.0) -> Tensor:
    """SD3's logit-normal density of the flow-matching time as a weight of the velocity's error at uniform times.

    In expectation it is the loss of drawing logit(t) ~ N(logit_mean, logit_std²); t = 1 is pure noise, and the
    time of a log-SNR is 1 / (1 + √SNR). Source: Esser et al., ICML 2024, arXiv 2403.03206.

    Args:
        log_snr: any shape.
        logit_mean: finite.
        logit_std: positive.

    Returns:
        Weights of the error of ε, same shape, dtype and device.

    Raises:
        ValueError: ``logit_std`` is not positive.
    """
    if not logit_std > 0:
        raise ValueError(f"logit_std: expected a positive number, found {logit_std}")
    logit, spread = -0.5 * log_snr, logit_std * math.sqrt(2.0 * math.pi)
    noise, signal = torch.sigmoid(logit), torch.sigmoid(-logit)
    density = torch.exp(-0.5 * ((logit - logit_mean) / logit_std) ** 2) / (spread * noise * signal)
    return density / signal**2


def mode_weight(log_snr: Tensor, mode_scale: float = 1.29) -> Tensor:
    """SD3's density with heavy tails around a mode, as a weight of the velocity's error at uniform times.

    In expectation it is the loss of drawing t = 1 − u − mode_scale (cos²(π u / 2) − 1 + u) with u ~ U(0, 1), see
    `logit_normal_weight`. Source: Esser et al., ICML 2024, arXiv 2403.03206.

    Args:
        log_snr: any shape.
        mode_scale: above −1 and below 2 / (π − 2) ≈ 1.75; middle times are favoured where it is positive.

    Returns:
        Weights of the error of ε, same shape, dtype and device.

    Raises:
        ValueError: ``mode_scale`` is out of range.
    """
    check_mode_scale(mode_scale)
    density = mode_density(torch.sigmoid(-0.5 * log_snr.double()), mode_scale)
    return (density / torch.sigmoid(0.5 * log_snr.double()) ** 2).to(log_snr.dtype)


def cosmap_weight(log_snr: Tensor) -> Tensor:
    """SD3's CosMap: 2 / (π (1 − 2t + 2t²)) of the velocity's error at uniform times, see `logit_normal_weight`.

    It gives flow-matching times the log-SNR distribution of the cosine schedule. Source: Esser et al., ICML 2024,
    arXiv 2403.03206.

    Args:
        log_snr: any shape.

    Returns:
        Weights of the error of ε, same shape, dtype and device; without a bound at high noise.
    """
    noise, signal = torch.sigmoid(-0.5 * log_snr), torch.sigmoid(0.5 * log_snr)
    return 2.0 / (math.pi * (noise**2 + signal**2) * signal**2)


def sigma_sqrt_weight(log_snr: Tensor) -> Tensor:
    """Sigma squared ("sigma_sqrt"): 1 / t² of the error of x_0 at the flow-matching time t = 1 / (1 + √SNR).

    That is weight 1 of the velocity's error. Source: the training scripts of diffusers for SD3, which weigh the
    error of x_0.

    Args:
        log_snr: any shape.

    Returns:
        Weights of the error of ε, same shape, dtype and device; without a bound at high noise.
    """
    return torch.sigmoid(0.5 * log_snr) ** -2


LOSS_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "min_snr": min_snr_weight,
    "soft_min_snr": soft_min_snr_weight,
    "p2": p2_weight,
    "debiased": debiased_weight,
    "edm": edm_weight,
    "truncated_snr": truncated_snr_weight,
    "logit_normal": logit_normal_weight,
    "mode": mode_weight,
    "cosmap": cosmap_weight,
    "sigma_sqrt": sigma_sqrt_weight,
}
"""The functions of loss weights by the names that the command line takes."""
# Names that training scripts give the arguments.
_PUBLISHED_NAMES = {
    "min_snr": {"snr_gamma": "gamma", "min_snr_gamma": "gamma"},
    "soft_min_snr": {"snr_gamma": "gamma", "min_snr_gamma": "gamma"},
}


def loss_weight(name: str, log_snr: Tensor, prediction_type: str = "epsilon", **arguments: float) -> Tensor:
    """A weight by the names that are typed, for what the model predicts.

    Args:
        name: one of `LOSS_WEIGHTS`.
        log_snr: any shape.
        prediction_type: see `predicted_weight`.
        **arguments: those of the weight's function; gamma of Min-SNR also as ``snr_gamma`` or ``min_snr_gamma``.

    Returns:
        Weights of the squared error of the prediction, same shape, dtype and device.

    Raises:
        TypeError: the weight does not take an argument.
        ValueError: there is no such weight or prediction type, an argument is given twice or is out of range.
    """
    if name not in LOSS_WEIGHTS:
        raise ValueError(f"name: expected one of {', '.join(LOSS_WEIGHTS)}, found {name!r}")
    renamed = rename(arguments, _PUBLISHED_NAMES.get(name, {}))
    return predicted_weight(LOSS_WEIGHTS[name](log_snr, **renamed), log_snr, prediction_type)


def predicted_weight(weight: Tensor, log_snr: Tensor, prediction_type: str) -> Tensor:
    """The weight with which another prediction's squared error makes the same loss.

    With x_t = α x_0 + σ ε, α² + σ² = 1, the errors of the same denoiser are ‖Δε‖² = SNR ‖Δx_0‖² = α² ‖Δv‖²
    (Salimans and Ho, "Progressive Distillation", ICLR 2022), so that Min-SNR-γ becomes min(SNR, γ) for x_0 and
    min(SNR, γ) / (SNR + 1) for v. On the straight path of flow matching, x_t = (1 − t) x_0 + t ε, the velocity
    ε − x_0 has the error ‖Δx_0‖² / t², with t = 1 / (1 + √SNR).

    Args:
        weight: of the squared error of ε, any shape.
        log_snr: same shape; for "sample" finite or −∞.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction", as in diffusers.

    Returns:
        Weights, same shape.

    Raises:
        ValueError: the prediction type is none of these.
    """
    if prediction_type == "epsilon":
        return weight
    if prediction_type == "v_prediction":
        return weight * torch.sigmoid(log_snr)
    if prediction_type == "sample":
        return weight * torch.exp(log_snr)
    if prediction_type == "flow_prediction":
        return weight * torch.sigmoid(0.5 * log_snr) ** 2
    raise ValueError(
        "prediction_type: expected 'epsilon', 'v_prediction', 'sample' or 'flow_prediction', found "
        f"{prediction_type!r}"
    )


def scheduler_weights(
    scheduler: Any, name: str, prediction_type: str | None = None, **arguments: float
) -> Tensor:
    """The weight of the squared error at every training noise level of a scheduler.

    Args:
        scheduler: as `diffusion.log_snr` takes it.
        name: one of `LOSS_WEIGHTS`.
        prediction_type: whose error it is; by default what the scheduler's config says, or else "epsilon", and the
            velocity for flow matching.
        **arguments: see `loss_weight`.

    Returns:
        float32 [T], in the order of `diffusion.log_snr`.

    Raises:
        TypeError: the weight does not take an argument.
        ValueError: there is no such weight, or it has no bound on this schedule.
    """
    usual = "flow_prediction" if hasattr(scheduler, "scale_noise") else "epsilon"
    kind = prediction_type or scheduler.config.get("prediction_type") or usual
    # At pure noise and pure signal the limit is wanted, where there is one: not infinity times zero.
    weights = loss_weight(
        name, torch.from_numpy(log_snr(scheduler, clip=(-_REACH, _REACH))), kind, **arguments
    )
    if not weights.max() < _UNBOUNDED:
        raise ValueError(
            f"weight: expected one that is bounded for prediction type {kind} on this schedule, found "
            f"{name}, which is {weights.max():.3g} at timestep {int(weights.argmax())}"
        )
    return weights.float()
