"""Loss weights and timestep densities for the training scripts of diffusers; nothing of diffusers is imported.

Two functions have the names and the arguments of those in ``diffusers.training_utils``, and `SchedulerLoss` is
what takes the place of ``loss.mean()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..clustering import BetaTime, LaplaceTime, LogitNormalTime, ModeTime, NoiseDistribution, UniformTime
from ..diffusion import LOSS_WEIGHTS, log_snr, loss_weight, scheduler_weights
from ..weighting import ContinuousUncertainty

# The log-SNR that stands for pure signal, and negative for pure noise.
_REACH = 80.0
# Schemes of diffusers that are either a density or, at uniform times, a weight.
DENSITIES = ("logit_normal", "mode", "beta", "laplace")
#: What `compute_density_for_timestep_sampling` takes; all others than `DENSITIES` draw uniform times.
SCHEMES = ("none", "sigma_sqrt", *DENSITIES, *(name for name in LOSS_WEIGHTS if name not in DENSITIES))


def compute_density_for_timestep_sampling(
    weighting_scheme: str,
    batch_size: int,
    logit_mean: float | None = None,
    logit_std: float | None = None,
    mode_scale: float | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    **arguments: float,
) -> Tensor:
    """Draw the u in (0, 1) that a script turns into ``timesteps[(u * T).long()]``.

    The scripts' timesteps fall from pure noise to the image, so that their time of pure noise is u = 0; the
    schemes are those of SD3 (Esser et al., ICML 2024, arXiv 2403.03206) in u, as in diffusers. Where a
    distribution is not symmetric (logit_mean other than 0, beta) that turns it around.

    Args:
        weighting_scheme: "logit_normal", "mode", "beta" or "laplace"; any other of `SCHEMES` is a weight, and u
            is uniform.
        batch_size: B.
        logit_mean: of logit_normal, 0 by default.
        logit_std: of logit_normal, 1 by default.
        mode_scale: of mode, 1.29 by default.
        device: of the result.
        generator: source of randomness, on that device.
        **arguments: a, b of beta; mean, scale of the log-SNR of laplace.

    Returns:
        u, float32 [B].

    Raises:
        TypeError: the scheme does not take an argument.
        ValueError: there is no such scheme, or an argument is out of range.
    """
    _check_scheme(weighting_scheme)
    laws: dict[str, Callable[..., NoiseDistribution]] = {
        "logit_normal": LogitNormalTime,
        "mode": ModeTime,
        "beta": BetaTime,
        "laplace": LaplaceTime,
    }
    settings = {"mean": logit_mean, "std": logit_std} if weighting_scheme == "logit_normal" else {}
    settings |= {"mode_scale": mode_scale} if weighting_scheme == "mode" else {}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    law = laws.get(weighting_scheme, UniformTime)(**given | arguments)
    # Away from 0 and 1, where quantiles may be infinite.
    cells = torch.randint(2**52, (batch_size,), device=device, generator=generator)
    return law.quantile((cells.double() + 0.5) / 2**52).float()


def compute_loss_weighting_for_sd3(
    weighting_scheme: str, sigmas: Tensor, prediction_type: str | None = None, **arguments: float
) -> Tensor:
    """The weight of the loss at flow-matching times σ.

    Without `prediction_type` it is what diffusers returns: 1 / σ² ("sigma_sqrt"), SD3's CosMap density of σ
    ("cosmap"), or 1. The first belongs to the error of x_0 (a script's ``precondition_outputs=1``), the second to
    that of the velocity. With it every weight is the one of that prediction, and all `LOSS_WEIGHTS` are there;
    "logit_normal" and "mode" stay 1, since the scripts draw the times by them.

    Args:
        weighting_scheme: one of `SCHEMES`.
        sigmas: σ in (0, 1], any shape.
        prediction_type: whose squared error is weighed, "flow_prediction" for the velocity or "sample" for x_0;
            see `diffusion.predicted_weight`.
        **arguments: of the weight's function, also as snr_gamma.

    Returns:
        Weights, float32, same shape.

    Raises:
        TypeError: the weight does not take an argument.
        ValueError: there is no such scheme, or it needs a `prediction_type`.
    """
    _check_scheme(weighting_scheme)
    if weighting_scheme in ("none", *DENSITIES):
        return torch.ones_like(sigmas, dtype=torch.float32)
    usual = {"sigma_sqrt": "sample", "cosmap": "flow_prediction"}
    kind = usual.get(weighting_scheme) if prediction_type is None else prediction_type
    if kind is None:
        raise ValueError(f"prediction_type: expected one for {weighting_scheme}, found None")
    time = sigmas.double()
    levels = (2.0 * (torch.log1p(-time) - time.log())).clamp(-_REACH, _REACH)
    return loss_weight(weighting_scheme, levels, kind, **arguments).float()


class SchedulerLoss(nn.Module):
    """The losses [B] of a batch and its timesteps [B] → the scalar to minimise, in place of ``loss.mean()``.

    Args:
        scheduler: a scheduler of diffusers with discrete timesteps, before ``set_timesteps``.
        weight: one of `LOSS_WEIGHTS`, for what the scheduler's config says the model predicts; "none" for 1.
        uncertainty: learns a log-variance of every noise level on top; its parameters belong in the optimizer,
            `param_groups(model, loss_of)` does that.
        prediction_type: of the model; by default the scheduler's, the velocity for flow matching.
        **arguments: of the weight's function; snr_gamma, min_snr_gamma, logit_mean, logit_std, mode_scale, ….

    Attributes:
        uncertainty: the `ContinuousUncertainty`, or None.

    Raises:
        TypeError: the weight does not take an argument.
        ValueError: there is no such weight, or it has no bound on this schedule.

    Example:
        ``loss_of = SchedulerLoss(scheduler, "min_snr", snr_gamma=5.0)`` once, and then
        ``loss = loss_of(ops.sample_mse(pred, target), timesteps)``
    """

    def __init__(
        self,
        scheduler: Any,
        weight: str = "none",
        *,
        uncertainty: bool = False,
        prediction_type: str | None = None,
        **arguments: float,
    ) -> None:
        super().__init__()
        levels = torch.from_numpy(log_snr(scheduler, clip=(-_REACH, _REACH))).float()
        discrete = getattr(scheduler, "alphas_cumprod", None) is not None
        steps = torch.arange(len(levels)) if discrete else torch.as_tensor(scheduler.timesteps).detach().cpu()
        weights = torch.ones(len(levels))
        if weight != "none":
            weights = scheduler_weights(scheduler, weight, prediction_type, **arguments)
        elif arguments:
            raise TypeError(f"expected no arguments without a weight, found {', '.join(arguments)}")
        for name, values in {"_levels": levels, "_weights": weights, "_timesteps": steps}.items():
            self.register_buffer(name, values, persistent=False)
        self._levels: Tensor
        self._weights: Tensor
        self._timesteps: Tensor
        self._discrete = discrete
        self.uncertainty = ContinuousUncertainty() if uncertainty else None

    def forward(self, loss: Tensor, timesteps: Tensor) -> Tensor:
        """Weigh the losses of a batch.

        Args:
            loss: [B], floating point, one of every sample.
            timesteps: [B], of the scheduler.

        Returns:
            The scalar to minimise.

        Raises:
            TypeError, ValueError: a dtype or a shape is another.
        """
        if not loss.is_floating_point():
            raise TypeError(f"loss: expected a floating-point tensor [B], found {loss.dtype}")
        if loss.dim() != 1 or loss.shape != timesteps.shape:
            raise ValueError(
                "expected loss and timesteps of one shape [B], found "
                f"{list(loss.shape)} and {list(timesteps.shape)}"
            )
        if self._levels.device != loss.device:
            self.to(loss.device)
        if self._discrete:
            index = timesteps.to(loss.device)
        else:  # the nearest one: scripts round them to the model's dtype
            index = (timesteps.to(self._timesteps).unsqueeze(1) - self._timesteps).abs().argmin(1)
        weighted = loss * self._weights[index]
        if self.uncertainty is None:
            return weighted.mean()
        scalar: Tensor = self.uncertainty(weighted, self._levels[index])
        return scalar


def _check_scheme(name: str) -> None:
    if name not in SCHEMES:
        raise ValueError(f"weighting_scheme: expected one of {', '.join(SCHEMES)}, found {name!r}")
