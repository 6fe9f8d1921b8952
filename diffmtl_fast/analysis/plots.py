"""The pictures of the analyses."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._figures import colours, new_figure, save
from .affinity import TaskAffinity
from .difficulty import Convergence
from .negative_transfer import NegativeTransfer

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


def plot_negative_transfer(path: str | Path, found: NegativeTransfer, title: str) -> None:
    """Bars of the gap of every interval with their confidence intervals.

    Args:
        path: the picture file.
        found: what to draw.
        title: above the bars.

    Raises:
        ImportError: matplotlib is not installed.
    """
    number = found.intervals.k
    figure = new_figure(max(4.8, 0.95 * number + 1.6), 3.4)
    axis = figure.subplots()
    places = np.arange(number)
    shades = ["tab:red" if gap < 0 else "tab:blue" for gap in found.gaps]
    axis.bar(places, found.gaps, color=shades, width=0.7, alpha=0.8)
    # Bars are drawn from end to end: the basic bootstrap's interval need not contain the gap itself.
    axis.vlines(places, found.low, found.high, color="black", linewidth=1.4)
    for ends in (found.low, found.high):
        axis.plot(places, ends, linestyle="none", marker="_", color="black", markersize=9)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set_xticks(places, [f"{l}–{e - 1}" for l, e in pairwise(found.intervals.boundaries.tolist())])
    axis.set_xlabel("timesteps of the expert")
    axis.set_ylabel("negative transfer gap\n(Fréchet distance, expert − multi-task)")
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.set_title(f"{title}\nbelow 0: the expert is better (negative transfer)", fontsize=10)
    save(figure, Path(path))


def plot_convergence(path: str | Path, found: Convergence, title: str) -> None:
    """Loss curves of the intervals' own models, as they are and normalised, and the steps to a fraction.

    Args:
        path: the picture file.
        found: what to draw.
        title: above the panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9.6, 3.4)
    losses, remaining, steps = figure.subplots(1, 3)
    shades = colours(found.intervals.k)
    names = [f"{l}–{e - 1}" for l, e in pairwise(found.intervals.boundaries.tolist())]
    for j, (shade, name) in enumerate(zip(shades, names, strict=True)):
        losses.plot(found.steps, found.losses[j], color=shade, label=name, linewidth=1.2)
        remaining.plot(found.steps, found.remaining[j], color=shade, linewidth=1.2)
    if (found.losses > 0).all():
        losses.set_yscale("log")
    remaining.axhline(1.0 - found.fraction, color="black", linewidth=0.8, linestyle="--")
    remaining.set_ylim(-0.1, 1.05)
    for axis, label in ((losses, "training loss"), (remaining, "part of the fall yet to come")):
        axis.set_xlabel("iteration")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.25)
    places = np.arange(found.intervals.k)
    steps.bar(places, found.steps_to, color=shades, width=0.7)
    steps.set_xticks(places, names, rotation=45, ha="right", fontsize=8)
    steps.set_xlabel("timesteps")
    steps.set_title(f"iterations to {found.fraction:.0%} of the fall", fontsize=10)
    steps.grid(axis="y", alpha=0.25)
    steps.set_axisbelow(True)
    figure.legend(
        loc="outside lower left",
        ncols=min(found.intervals.k, 6),
        fontsize=8,
        frameon=False,
        title="timesteps",
    )
    figure.suptitle(title, fontsize=10)
    save(figure, Path(path))


def plot_relative_entropy(path: str | Path, curves: Mapping[str, Array], log_snr: Array, title: str) -> None:
    """Relative entropies of neighbouring noise levels against the timestep and against the log-SNR.

    Args:
        path: the picture file.
        curves: [T - 1] each, by name.
        log_snr: [T].
        title: above the panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(8.4, 3.4)
    axes = figure.subplots(1, 2, sharey=True)
    between = (log_snr[1:] + log_snr[:-1]) / 2
    for axis, places, label in (
        (axes[0], np.arange(1, len(log_snr)), "timestep t"),
        (axes[1], between, "log-SNR"),
    ):
        for (name, values), style in zip(curves.items(), ("-", "--", ":", "-."), strict=False):
            axis.plot(places, values, style, color="black", linewidth=1.4, label=name)
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative entropy of $p_{t-1}$ and $p_t$\n(nats per dimension)")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, Path(path))
