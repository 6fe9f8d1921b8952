"""Noise processes and schedules: noisy inputs, targets, log-SNR, loss weights by noise level."""

from __future__ import annotations

from .loss_weights import (
    LOSS_WEIGHTS,
    cosmap_weight,
    debiased_weight,
    edm_weight,
    logit_normal_weight,
    loss_weight,
    min_snr_weight,
    mode_weight,
    p2_weight,
    predicted_weight,
    scheduler_weights,
    sigma_sqrt_weight,
    soft_min_snr_weight,
    truncated_snr_weight,
)
from .processes import EDM, DiscreteVP, FlowMatching, NoiseProcess, noise_process
from .snr import log_snr

__all__ = [
    "EDM",
    "LOSS_WEIGHTS",
    "DiscreteVP",
    "FlowMatching",
    "NoiseProcess",
    "cosmap_weight",
    "debiased_weight",
    "edm_weight",
    "log_snr",
    "logit_normal_weight",
    "loss_weight",
    "min_snr_weight",
    "mode_weight",
    "noise_process",
    "p2_weight",
    "predicted_weight",
    "scheduler_weights",
    "sigma_sqrt_weight",
    "soft_min_snr_weight",
    "truncated_snr_weight",
]
