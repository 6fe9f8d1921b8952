"""Noise schedules: log-SNR of diffusers schedulers, loss weights by noise level."""

from __future__ import annotations

from .loss_weights import min_snr_weight, p2_weight, predicted_weight
from .snr import log_snr

__all__ = ["log_snr", "min_snr_weight", "p2_weight", "predicted_weight"]
