"""The pictures of a run."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._extras import require
from .._figures import colours, new_figure, save, smooth
from ..clustering import ClusterPath, IntervalClustering

# Schedules that reach pure noise or pure signal have no end on a plot.
LOG_SNR_DRAWN = (-25.0, 25.0)


def samples(path: Path, pictures: Tensor, labels: Tensor | None, title: str) -> None:
    """A grid of pictures, one row per class.

    Args:
        path: the picture file.
        pictures: [N, C, H, W] in [-1, 1]; of channels other than 1 or 3 the first is drawn.
        labels: [N] classes; None for one square grid.
        title: above the grid.
    """
    rows = _rows(pictures, labels)
    columns = max(len(row) for _, row in rows)
    if pictures.shape[1] not in (1, 3):  # no colours: latents, for example
        pictures = pictures[:, :1]
    images = ((pictures.clamp(-1, 1) + 1) / 2).movedim(1, -1).numpy()
    height, width = images.shape[1:3]
    size = 0.55
    figure = new_figure(size * columns * width / height + 0.4, size * len(rows) + 0.45)
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    for axes, (name, row) in zip(grid, rows, strict=True):
        for axis in axes:
            axis.set_axis_off()
        for axis, index in zip(axes, row, strict=False):
            axis.imshow(images[index].squeeze(), cmap="gray", vmin=0, vmax=1)
        if name is not None:
            axes[0].text(-0.25, 0.5, name, transform=axes[0].transAxes, ha="right", va="center", fontsize=11)
    if columns >= 6:  # a narrower grid has no room for it
        figure.suptitle(title, fontsize=10)
    save(figure, path)


def clusters(
    path: Path,
    clustering: IntervalClustering,
    log_snr: NDArray[np.float64],
    title: str,
    costs: ClusterPath | None = None,
    continuous: bool = False,
) -> None:
    """The log-SNR curve with the clusters' intervals shaded.

    Args:
        path: the picture file.
        clustering: the clusters.
        log_snr: [T].
        title: above the curve.
        costs: the optima for every k, drawn in a second panel.
        continuous: the timesteps are cells of equal probability of continuous levels.
    """
    figure = new_figure(6.4 if costs is None else 9.6, 3.2)
    if costs is None:
        axis = figure.subplots()
    else:
        axis, beside = figure.subplots(1, 2, width_ratios=[2, 1])
        _plot_costs(costs, beside)
    shades = colours(clustering.k)
    edges = clustering.boundaries
    for cluster, (left, right) in enumerate(itertools.pairwise(edges)):
        axis.axvspan(left, right, color=shades[cluster], alpha=0.25, linewidth=0)
        if cluster:
            axis.axvline(left, color="white", linewidth=1.0)
        share = (right - left) / clustering.num_timesteps
        label = f"{cluster}\n{left}–{right - 1}" if share > 0.09 else str(cluster) if share > 0.03 else ""
        middle = (left + right) / 2
        axis.text(
            middle, 0.96, label, transform=axis.get_xaxis_transform(), ha="center", va="top", fontsize=8
        )
    axis.plot(np.arange(len(log_snr)), log_snr, color="black", linewidth=1.8)
    low, high = float(log_snr.min()), float(log_snr.max())
    axis.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))  # room for the labels
    axis.set_xlim(0, clustering.num_timesteps)
    axis.set_xlabel("quantile of the noise level" if continuous else "timestep t")
    axis.set_ylabel("log-SNR")
    axis.set_title(title, fontsize=10)
    save(figure, path)


def samplers(
    path: Path,
    probabilities: dict[str, dict[str, NDArray[np.float64]]],
    clustering: IntervalClustering,
    title: str,
) -> None:
    """What every sampler draws, a panel each, with the clusters' intervals shaded.

    Args:
        path: the picture file.
        probabilities: [T] of the timesteps, by the sampler and what it depends on.
        clustering: the clusters.
        title: above the panels.
    """
    columns = 4
    rows = -(-len(probabilities) // columns)
    figure = new_figure(2.9 * columns, 2.2 * rows + 0.4)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axis in panels[len(probabilities) :]:
        axis.set_axis_off()
    number = clustering.num_timesteps
    for axis, (name, cases) in zip(panels, probabilities.items(), strict=False):
        for cluster, (left, right) in enumerate(itertools.pairwise(clustering.boundaries)):
            axis.axvspan(left, right, color="black", alpha=0.07 * (cluster % 2), linewidth=0)
        axis.axhline(1.0, color="dimgray", linewidth=0.8, linestyle=":")
        for colour, (case, values) in zip(colours(len(cases)), cases.items(), strict=True):
            axis.stairs(
                number * values, np.arange(number + 1), color=colour, baseline=None, linewidth=1.4, label=case
            )
        axis.set_title(name, fontsize=10)
        axis.set_xlim(0, number)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8, labelbottom=True)
        if len(cases) > 1:
            axis.legend(fontsize=6, frameon=False)
    figure.supxlabel("timestep t (log-SNR clusters shaded)", fontsize=9)
    figure.supylabel("times as often as in ordinary training", fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _plot_costs(path: ClusterPath, axis: Any) -> None:
    """Cost against k, with the chosen k."""
    chosen = path.chosen
    axis.plot(path.ks, path.costs, color="black", linewidth=1.6, marker=".", markersize=5)
    label = f"chosen: k = {chosen.k}"
    axis.plot([chosen.k], [chosen.cost], marker="o", color="tab:red", linestyle="none", label=label)
    axis.xaxis.set_major_locator(require("matplotlib.ticker", "train").MaxNLocator(integer=True))
    axis.set_xlabel("number of clusters k")
    axis.set_ylabel("optimal cost")
    axis.legend(frameon=False)


def uncertainty(
    path: Path,
    log_snr: NDArray[np.float64],
    log_var: NDArray[np.float64],
    centres: NDArray[np.float64],
    log_losses: NDArray[np.float64],
    title: str,
) -> None:
    """The log-variance u learned at every noise level, and the weight e^−u of the loss there.

    Args:
        path: the picture file.
        log_snr: [T].
        log_var: u, [T].
        centres: mean log-SNR of every cluster, [K].
        log_losses: logarithm of every cluster's last losses, [K], which u is best at; NaN for none.
        title: above the panels.
    """
    figure = new_figure(8.4, 3.2)
    left, right = figure.subplots(1, 2)
    left.plot(log_snr, log_var, color="black", linewidth=1.8, label="u")
    left.plot(centres, log_losses, "o", color="tab:red", markersize=5, label="log loss of each cluster")
    left.set_ylabel("log-variance u")
    left.legend(frameon=False, fontsize=8)
    right.semilogy(log_snr, np.exp(-log_var), color="black", linewidth=1.8)
    right.set_ylabel("weight of the loss, exp(−u)")
    for axis in (left, right):
        axis.set_xlabel("log-SNR (noisier to the left)")
        axis.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def training(path: Path, lines: Sequence[dict[str, Any]], title: str) -> None:
    """Losses, held-out losses, weights and gradient cosines of the clusters, and the phases of a curriculum.

    Args:
        path: the picture file.
        lines: lines of log.jsonl.
        title: above the panels.
    """
    panels = [("losses", "loss of each cluster")]
    if any("validation" in line for line in lines):
        panels.append(("validation", "loss on held-out samples"))
    if any("weights" in line for line in lines):
        panels.append(("weights", "weight of each cluster"))
    if any("cosines" in line for line in lines):
        panels.append(("cosines", "cosine of cluster gradients"))
    width = max(3.2 * len(panels), 4.8)
    figure = new_figure(width, 3.2)
    columns = min(5, int(width / 1.4))
    legends = {}
    for axis, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        used = [line for line in lines if name in line]
        steps = np.array([line["iteration"] for line in used])
        values = np.array([line[name] for line in used], dtype=float)  # None becomes NaN
        draw = _plot_cosines if name == "cosines" else _plot_clusters
        draw(axis, steps, values)
        if name == "cosines":
            _shade_conflicts(axis, used)
        _mark_phases(axis, lines, None if name == "cosines" else "phase of the curriculum")
        # The clusters have the same colours in the first two panels.
        legends["right" if name == "cosines" else "left"] = axis.get_legend_handles_labels()
        axis.set_xlabel("iteration")
        axis.set_title(label, fontsize=10)
        axis.xaxis.set_major_locator(require("matplotlib.ticker", "train").MaxNLocator(5, integer=True))
        axis.grid(alpha=0.25)
    for side, handles in legends.items():
        figure.legend(
            *handles, loc=f"outside lower {side}", ncols=columns, fontsize=8, frameon=False, handlelength=1.5
        )
    figure.suptitle(textwrap.fill(title, int(14 * width)), fontsize=10)
    save(figure, path)


def _plot_clusters(axis: Any, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    lines = smooth(values, _reach(len(steps)))
    for cluster, colour in enumerate(colours(values.shape[1])):
        axis.plot(steps, values[:, cluster], color=colour, alpha=0.2, linewidth=0.8)
        axis.plot(steps, lines[:, cluster], color=colour, label=_label(f"cluster {cluster}", cluster))
    if np.nanmin(values) > 0.0:
        axis.set_yscale("log")


def _plot_cosines(axis: Any, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """One line per pair of clusters, coloured by how far apart they are."""
    number = values.shape[1]
    lines = smooth(values, _reach(len(steps)))
    axis.axhline(0.0, color="black", linewidth=0.8)
    for distance, colour in enumerate(colours(number - 1), start=1):
        for i in range(number - distance):
            label = _label(_apart(distance) if i == 0 else "", distance)
            axis.plot(steps, lines[:, i, i + distance], color=colour, linewidth=1.0, label=label)
    axis.set_ylim(-1.05, 1.05)


def _shade_conflicts(axis: Any, lines: Sequence[dict[str, Any]]) -> None:
    """The share of conflicting pairs behind the cosines, on an axis of its own."""
    share = np.array([line.get("conflicts") for line in lines], dtype=float)  # None becomes NaN
    steps = [line["iteration"] for line in lines]
    behind = axis.twinx()
    behind.fill_between(
        steps, 0.0, 100 * smooth(share, _reach(len(lines))), color="black", alpha=0.12, linewidth=0
    )
    behind.set_ylim(0.0, 100.0)
    behind.set_ylabel("conflicting pairs (%), shaded", fontsize=8)
    behind.tick_params(labelsize=8)
    axis.set_zorder(behind.get_zorder() + 1)
    axis.patch.set_visible(False)


def _mark_phases(axis: Any, lines: Sequence[dict[str, Any]], label: str | None) -> None:
    """Shade every second phase of a curriculum, and number those that are wide enough."""
    starts = {1: 0}  # of each phase
    for line in lines:
        starts.setdefault(line.get("phase", 1), line["iteration"])
    if len(starts) == 1:
        return
    end = lines[-1]["iteration"]
    axis.set_xlim(0, end)
    for index, (left, right) in enumerate(itertools.pairwise([*starts.values(), end])):
        if index % 2:
            axis.axvspan(left, right, color="black", alpha=0.08, linewidth=0, label=label)
            label = None  # one line in the legend
        if right - left > 0.06 * end:
            place = {"ha": "center", "va": "top", "transform": axis.get_xaxis_transform()}
            axis.text((left + right) / 2, 0.985, str([*starts][index]), fontsize=7, color="dimgray", **place)


def _apart(distance: int) -> str:
    return "adjacent clusters" if distance == 1 else f"{distance} apart"


def _label(text: str, index: int) -> str | None:
    """Legends name the first ten lines."""
    return text if text and index < 10 else None


def _reach(lines: int) -> int:
    return max(1, lines // 30)


def _rows(pictures: Tensor, labels: Tensor | None) -> list[tuple[str | None, list[int]]]:
    if labels is None:
        side = int(np.ceil(np.sqrt(len(pictures))))
        return [
            (None, list(range(start, min(start + side, len(pictures)))))
            for start in range(0, len(pictures), side)
        ]
    return [(str(label), (labels == label).nonzero()[:, 0].tolist()) for label in labels.unique().tolist()]
