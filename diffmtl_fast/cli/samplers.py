"""``diffmtl-fast samplers``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .._errors import blame
from .._number_types import PositiveInt, Size
from ..clustering import cluster_snr
from ..curriculum.named import all_densities
from ..diffusion.named_schedules import SCHEDULES, read_log_snr
from ..run import plots
from .output import columns, writing


def samplers(
    scheduler: str = SCHEDULES[0], timesteps: Size = 1000, k: PositiveInt = 5, plot: str | None = None
) -> None:
    """Show which timesteps the samplers of training draw.

    The table has the share of every log-SNR cluster in what is drawn. Samplers that follow losses are shown after
    those of the best denoiser of white noise, SNR / (1 + SNR).

    Args:
        scheduler: squaredcos_cap_v2, linear, scaled_linear, or a .npy or .json file of log-SNR [T]
        timesteps: T of a named schedule
        k: number of log-SNR clusters
        plot: picture file of the probabilities of the timesteps
    """
    with blame("scheduler"):
        levels = read_log_snr(scheduler, timesteps)
    with blame("k"):
        clusters = cluster_snr(levels, k)
    with blame("scheduler"):
        shown = all_densities(clusters, levels)
    if plot is not None:
        with writing("plot", Path(plot)) as aside, blame("plot"):
            plots.samplers(aside, shown, clusters, f"timesteps that samplers draw, {scheduler}")
    rows = [["sampler", *(f"cluster {j}" for j in range(clusters.k))]]
    for name, cases in shown.items():
        for case, values in cases.items():
            shares = np.add.reduceat(values, clusters.boundaries[:-1])
            rows.append([f"{name}, {case}" if case else name, *(f"{share:.3f}" for share in shares)])
    print(columns(rows, named=True))
