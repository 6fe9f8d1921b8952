"""log-SNR of the named noise schedules of diffusers, in float64 and without importing diffusers; or of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..clustering.inputs import load_values

SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")


def named_log_snr(name: str, num_timesteps: int) -> NDArray[np.float64]:
    """log(ᾱ / (1 - ᾱ)) of a schedule with the constants that it is commonly used with.

    ``squaredcos_cap_v2`` is Nichol & Dhariwal's cosine schedule (2021), betas capped at 0.999; ``linear`` goes
    from 1e-4 to 0.02 (DDPM); ``scaled_linear`` is linear in √β from 0.00085 to 0.012 (latent diffusion).

    Args:
        name: one of :data:`SCHEDULES`.
        num_timesteps: T.

    Returns:
        float64 [T].

    Raises:
        ValueError: another name.
    """
    if name == "squaredcos_cap_v2":
        bar = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)
    elif name == "linear":
        betas = np.linspace(1e-4, 0.02, num_timesteps)
    elif name == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, num_timesteps) ** 2
    else:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, found {name!r}")
    log_signal = np.cumsum(np.log1p(-betas))
    return log_signal - np.log(-np.expm1(log_signal))


def read_log_snr(
    schedule: str, num_timesteps: int, clip: Sequence[float] | None = None
) -> NDArray[np.float64]:
    """The log-SNR of the schedule that is named, or that a file holds.

    Args:
        schedule: one of :data:`SCHEDULES`, or a .npy or .json file of log-SNR [T].
        num_timesteps: T of a named schedule.
        clip: bounds of the log-SNR, for schedules that end in pure noise; None for none.

    Returns:
        float64 [T] (float32 of such a file).

    Raises:
        ValueError: another name, or no finite numbers [T] in the file.
    """
    if schedule in SCHEDULES:
        levels = named_log_snr(schedule, num_timesteps)
    elif Path(schedule).suffix in (".npy", ".json"):
        levels = load_values(schedule)
    else:
        raise ValueError(f"expected {', '.join(SCHEDULES)}, or a .npy or .json file, found {schedule!r}")
    if levels.ndim != 1 or levels.size == 0:
        raise ValueError(f"expected numbers [T] in {schedule}, found shape {list(levels.shape)}")
    if clip is not None:
        levels = np.clip(levels, clip[0], clip[1])
    bad = np.flatnonzero(~np.isfinite(levels))
    if bad.size:
        raise ValueError(
            f"expected finite numbers in {schedule}, found {levels[bad[0]]} at index {bad[0]}; "
            "--clip [-20,20] bounds them"
        )
    return levels
