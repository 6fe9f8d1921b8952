"""The forward process of a noise schedule and the loss of undoing it, by the fused ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.denoising_loss import Prediction
from .errors import UserError

#: diffusers' names of what a model predicts, to those of `ops.denoising_loss`.
PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


class Denoising:
    """x_t = α x_0 + σ ε with α = √ᾱ_t and σ = √(1 − ᾱ_t), and the loss of a model that is to undo it.

    α and σ of all timesteps are put on the device once: a step gathers those of its samples and nothing crosses
    from the host, as it does in the scheduler's own ``add_noise``, which is not called.

    Args:
        scheduler: its ``alphas_cumprod`` [T] is the forward process, its ``prediction_type`` says what the model
            predicts: "epsilon" (the default), "v_prediction" or "sample".
        device: of the tables and of all that is given to the methods.
        weights: of the squared error at every timestep, float32 [T] on the device; 1 by default.

    Raises:
        UserError: the prediction type is another.
    """

    def __init__(self, scheduler: Any, device: torch.device, weights: Tensor | None = None) -> None:
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise UserError(
                f"scheduler.args.prediction_type: expected epsilon, v_prediction or sample, found {kind!r}"
            )
        self._prediction = PREDICTIONS[kind]
        signal = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float32, device=device)
        self._shares = torch.stack([signal, 1.0 - signal]).sqrt()
        self._weights = weights

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy images x_t.

        Args:
            x0: float32 [B, C, H, W].
            noise: likewise.
            t: int64 [B].

        Returns:
            float32 [B, C, H, W].
        """
        alpha, sigma = self._shares[:, t]
        return ops.add_noise(x0, noise, alpha, sigma)

    def loss(self, pred: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The weighted mean squared error of every sample against what the model is to predict.

        Args:
            pred: floating point [B, C, H, W], what the model returned for the noisy images.
            x0: as given to `add_noise`.
            noise: likewise.
            t: likewise.

        Returns:
            [B], float32 at least.
        """
        alpha, sigma = self._shares[:, t] if self._prediction == "v" else (None, None)
        return ops.denoising_loss(
            pred,
            x0,
            noise,
            prediction=self._prediction,
            alpha=alpha,
            sigma=sigma,
            weight=None if self._weights is None else self._weights[t],
        )
