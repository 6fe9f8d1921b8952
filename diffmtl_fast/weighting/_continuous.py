"""Continuous uncertainty weighting: a learned log-variance for every noise level, without clusters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# EDM feeds its networks ln(σ) / 4, and the log-SNR of its noise levels is −2 ln σ.
_SCALE = -1 / 8
# Noise levels beyond are pure signal or pure noise, where log-SNR may be infinite.
_REACH = 20.0


class FourierFeatures(nn.Module):
    """√2 cos and sin of a noise level at frequencies spread like half a normal distribution.

    Args:
        channels: C, even; half of the features are cosines, half sines.

    Raises:
        ValueError: `channels` is odd or below 2.
    """

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"channels: expected an even number of at least 2, found {channels}")
        share = (torch.arange(channels // 2) + 0.5) / (channels // 2)
        self.register_buffer("frequencies", 2 * math.pi * torch.special.ndtri(0.5 + 0.5 * share))

    def forward(self, log_snr: Tensor) -> Tensor:
        """Log-SNR [...] → features [..., C]."""
        level = _SCALE * log_snr.to(self.frequencies).clamp(-_REACH, _REACH)
        angles = level[..., None] * self.frequencies
        return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], -1)


class ContinuousUncertainty(nn.Module):
    """mean_i (e^{−u(λ_i)} L_i + u(λ_i)) over the samples of a batch, u a learned function of their log-SNR λ.

    Where the loss at a noise level is L, u is best at log L: every level comes to weigh one over its loss, what
    `UncertaintyWeighting` does for clusters. No clusters are needed, and a step costs a plain step. u is linear in
    Fourier features of λ and starts at 0, that is as ordinary training; it is learned by the same optimizer as
    the model, at a rate of its own: see `param_groups`. It is constant beyond |λ| = 20.

    With one feature per timestep in place of the Fourier features it is `UncertaintyWeighting` with K = T.

    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), CVPR 2024,
    arXiv 2312.02696. Deviations: weights start at 0 and are not normalised; each of half as many frequencies, the
    quantiles of the distribution that EDM2 draws from, has a cosine and a sine in place of a random phase.

    Args:
        channels: number of features, even. Default 128.

    Attributes:
        features: log-SNR [...] → features [..., C].
        weight: float32 parameter [C], starts at 0; u = features · weight / √C.

    Raises:
        ValueError: `channels` is odd or below 2.

    Example:
        ``loss = weighting(ops.sample_mse(pred, noise), log_snr[t])``, in place of ``mse_loss(pred, noise)``
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.features = FourierFeatures(channels)
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, loss: Tensor, log_snr: Tensor) -> Tensor:
        """Weigh the losses of a batch.

        Args:
            loss: [B], floating point, one of every sample; times a fixed loss weight, if one is used.
            log_snr: [B], floating point, log(α² / σ²) of every sample's noise level; infinities are allowed.
                Of EDM's σ it is −2 log σ, of a flow-matching time 2 log((1 − t) / t).

        Returns:
            The scalar to minimise, float32 at least.

        Raises:
            TypeError, ValueError: a dtype or a shape is another.
        """
        return self.per_sample(loss, log_snr).mean()

    def per_sample(self, loss: Tensor, log_snr: Tensor) -> Tensor:
        """The terms whose mean `forward` returns, [B]; weigh them where samples count differently."""
        for name, values in {"loss": loss, "log_snr": log_snr}.items():
            if not values.is_floating_point():
                raise TypeError(f"{name}: expected a floating-point tensor [B], found {values.dtype}")
        if loss.dim() != 1 or loss.shape != log_snr.shape:
            raise ValueError(
                f"expected loss and log_snr of one shape [B], found {list(loss.shape)} and {list(log_snr.shape)}"
            )
        u = self.log_var(log_snr)
        return torch.exp(-u) * loss + u

    def log_var(self, log_snr: Tensor) -> Tensor:
        """u at every log-SNR, same shape."""
        # A product and a sum: autocast would round a matrix product to half precision.
        return (self.features(log_snr) * self.weight).sum(-1) / math.sqrt(len(self.weight))

    def extra_repr(self) -> str:
        """Show C."""
        return f"channels={len(self.weight)}"
