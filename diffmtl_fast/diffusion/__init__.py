"""Noise schedules: log-SNR of diffusers schedulers, loss weights by noise level."""

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
from .snr import log_snr

__all__ = [
    "LOSS_WEIGHTS",
    "cosmap_weight",
    "debiased_weight",
    "edm_weight",
    "log_snr",
    "logit_normal_weight",
    "loss_weight",
    "min_snr_weight",
    "mode_weight",
    "p2_weight",
    "predicted_weight",
    "scheduler_weights",
    "sigma_sqrt_weight",
    "soft_min_snr_weight",
    "truncated_snr_weight",
]
