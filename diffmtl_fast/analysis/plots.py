"""The pictures of the analyses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._figures import new_figure, save
from .affinity import TaskAffinity

Array = NDArray[np.float64]


def plot_affinity(path: str | Path, affinity: TaskAffinity, log_snr: Array, title: str) -> None:
    """Heat maps of the task affinities against the timestep and against the log-SNR.

    Args:
        path: the picture file.
        affinity: what to draw.
        log_snr: [T], finite and monotone.
        title: above the maps.

    Raises:
        ValueError: the log-SNR is of another number of timesteps.
        ImportError: matplotlib is not installed.
    """
    tasks = affinity.tasks
    if log_snr.shape != (tasks.num_timesteps,):
        raise ValueError(f"log_snr: expected shape [{tasks.num_timesteps}], found {list(log_snr.shape)}")
    figure = new_figure(8.4, 3.9)
    axes = figure.subplots(1, 2)
    edges = tasks.boundaries
    for axis, places, label in (
        (axes[0], edges.astype(np.float64), "timestep t"),
        (axes[1], _between(log_snr)[edges], "log-SNR"),
    ):
        mesh = _heat_map(axis, places, affinity.cosines)
        axis.set_xlabel(label)
        axis.set_ylabel(label)
    figure.colorbar(mesh, ax=axes, label="task affinity (cosine of gradients)", pad=0.02)
    figure.suptitle(title, fontsize=10)
    save(figure, Path(path))


def _heat_map(axis: Any, places: Array, values: Array) -> Any:
    mesh = axis.pcolormesh(places, places, values, cmap="RdBu_r", vmin=-1.0, vmax=1.0, rasterized=True)
    axis.set_aspect("equal")
    return mesh


def _between(values: Array) -> Array:
    """Edges [T + 1] of cells around values [T]; the outer ones as far away as the inner ones."""
    if len(values) == 1:
        return values[0] + np.array([-0.5, 0.5])
    middle = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middle[0]], middle, [2 * values[-1] - middle[-1]]])
