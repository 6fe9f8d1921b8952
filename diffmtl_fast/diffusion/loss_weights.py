"""Loss weights as functions of the log-SNR: for ε-prediction, and what they come to for other predictions."""

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


def predicted_weight(weight: Tensor, log_snr: Tensor, prediction_type: str) -> Tensor:
    """The weight with which another prediction's squared error makes the same loss.

    With x_t = α x_0 + σ ε, α² + σ² = 1, the errors of the same denoiser are ‖Δε‖² = SNR ‖Δx_0‖² = α² ‖Δv‖²
    (Salimans and Ho, "Progressive Distillation", ICLR 2022), so that Min-SNR-γ becomes min(SNR, γ) for x_0 and
    min(SNR, γ) / (SNR + 1) for v.

    Args:
        weight: of the squared error of ε, any shape.
        log_snr: same shape; for "sample" finite or −∞.
        prediction_type: "epsilon", "v_prediction" or "sample", as in diffusers.

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
    raise ValueError(
        f"prediction_type: expected 'epsilon', 'v_prediction' or 'sample', found {prediction_type!r}"
    )
