"""Loss weights as functions of the log-SNR, for ε-prediction."""

from __future__ import annotations

import torch
from torch import Tensor


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
