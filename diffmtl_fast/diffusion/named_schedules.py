"""log-SNR of the named noise schedules of diffusers, in float64 and without importing diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    import numpy as np

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
