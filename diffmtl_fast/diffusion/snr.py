"""Log-SNR of noise schedules."""

from __future__ import annotations

from typing import Any

import numpy as np


def log_snr(scheduler: Any, *, clip: tuple[float, float] | None = None) -> np.ndarray:
    """Log-SNR log(α² / σ²) of a diffusers scheduler's training noise levels, x_t = α x_0 + σ ε.

    - Schedulers with ``betas`` and ``alphas_cumprod`` (DDPM, DDIM, Euler, DPM-Solver, …):
      log(ᾱ / (1 − ᾱ)), index = timestep. ᾱ is recomputed in float64 from the betas, unless the scheduler
      changed it afterwards (a shifted SNR), in which case it is read as it stands.
    - Flow-matching schedulers (those with ``scale_noise``): 2 log((1 − σ) / σ) of ``sigmas``.
    - EDM, Karras and variance-exploding schedulers (``sigmas`` alone): −2 log σ.

    The latter two keep the order of ``scheduler.sigmas``, noisiest first; index i belongs to
    ``scheduler.timesteps[i]``. Nothing of diffusers is imported: the attributes decide.

    Args:
        scheduler: a scheduler, before ``set_timesteps`` where it has sigmas only.
        clip: bounds for the result, for schedules that reach pure noise or pure signal.

    Returns:
        float64 [T].

    Raises:
        TypeError: the object has no attribute that tells its noise levels.
        ValueError: the log-SNR is infinite somewhere and ``clip`` is not given, or the scheduler's sigmas are
            already those of sampling.
    """
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip: expected (low, high) with low < high, found {clip}")
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        values = _from_alphas_cumprod(scheduler)
    elif getattr(scheduler, "sigmas", None) is not None:
        values = _from_sigmas(scheduler)
    else:
        raise TypeError(
            f"scheduler: expected alphas_cumprod or sigmas, found neither on {type(scheduler).__name__}"
        )
    if clip is not None:
        return np.clip(values, *clip)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(
            f"expected a finite log-SNR, found {values[bad[0]]} at index {bad[0]} (a schedule that ends in pure "
            "noise or pure signal); bound it, for example clip=(-20, 20)"
        )
    return values


def _from_alphas_cumprod(scheduler: Any) -> np.ndarray:
    alphas_cumprod = _float64(scheduler.alphas_cumprod)
    if getattr(scheduler, "betas", None) is not None:
        betas = _float64(scheduler.betas)
        recomputed = np.cumprod(1.0 - betas)
        # ᾱ spans decades: an absolute tolerance would hide what was changed where it is small.
        if recomputed.shape == alphas_cumprod.shape and np.allclose(
            recomputed, alphas_cumprod, rtol=1e-3, atol=0
        ):
            alphas_cumprod = recomputed
    with np.errstate(divide="ignore"):
        return np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)


def _from_sigmas(scheduler: Any) -> np.ndarray:
    if getattr(scheduler, "num_inference_steps", None) is not None:
        raise ValueError(
            "scheduler: expected its training noise levels, found those of sampling; "
            "pass a scheduler on which set_timesteps was not called"
        )
    sigmas = np.trim_zeros(_float64(scheduler.sigmas), "b")  # sampling ends at an extra sigma of 0
    with np.errstate(divide="ignore"):
        if hasattr(scheduler, "scale_noise"):
            return 2.0 * (np.log1p(-sigmas) - np.log(sigmas))
        return -2.0 * np.log(sigmas)


def _float64(values: Any) -> np.ndarray:
    """A tensor, array or list as a float64 array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
