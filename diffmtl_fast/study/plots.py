"""The pictures of a study."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from .._figures import colours, new_figure, save
from .plan import VANILLA, Variant
from .results import Axis, Results
from .statistics import Differences

#: The panels of the curves, each beside plain training.
PANELS = {
    "uncertainty weighting": ("uw",),
    "PCGrad": ("pcgrad",),
    "NashMTL": ("nash",),
    "curricula": ("easy_to_hard", "hard_to_easy"),
}
_LABELS = {"steps": "iteration", "calibrated": "training time (plain steps)"}
_STYLES = ("-", "--", ":")


def curves(path: Path, results: Results) -> None:
    """Fréchet distance against steps and against calibrated time: mean over the seeds, and their range.

    Args:
        path: the picture file.
        results: what to draw.
    """
    figure = new_figure(11.0, 5.6)
    axes = figure.subplots(2, len(PANELS), sharey=True)
    axis_names: tuple[Axis, ...] = ("steps", "calibrated")
    for row, place in zip(axes, axis_names, strict=True):
        for axis, (title, kinds) in zip(row, PANELS.items(), strict=True):
            _curve(axis, results, VANILLA, place, "black", "-")
            chosen = [v for v in results.cases() if v.kind in kinds and v != VANILLA]
            for variant, shade, style in zip(chosen, colours(max(len(chosen), 1)), _STYLES, strict=False):
                _curve(axis, results, variant, place, shade, style)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(_some_labels())
            axis.set_xlabel(_LABELS[place])
            axis.grid(alpha=0.25, which="both")
            if place == "steps":
                axis.set_title(title, fontsize=10)
            else:
                axis.legend(fontsize=7, frameon=False)
        row[0].set_ylabel("Fréchet distance")
    save(figure, path)


def _some_labels() -> Any:
    """Labels between powers of ten: all of a short axis, few of a long one."""
    return require("matplotlib.ticker", "train").LogFormatter(minor_thresholds=(2, 0.5))


def _curve(axis: Any, results: Results, variant: Variant, place: Axis, shade: Any, style: str) -> None:
    runs = [results.curves[variant.name, seed] for seed in results.seeds(variant)]
    if not runs:
        return
    distance = np.log(np.stack([run.figures["frechet_distance"] for run in runs]))
    position = runs[0].position[place]
    label = variant.title.rpartition(", ")[2]
    axis.plot(position, np.exp(distance.mean(0)), style, color=shade, linewidth=1.3, label=label)
    low, high = np.exp(distance.min(0)), np.exp(distance.max(0))
    axis.fill_between(position, low, high, color=shade, alpha=0.12, linewidth=0)


def comparisons(path: Path, panels: dict[str, tuple[list[str], Differences]]) -> None:
    """Ratios to plain training with their intervals, a panel for each of several figures.

    Args:
        path: the picture file.
        panels: names of the cases and their mean log ratios, by title.
    """
    number = max(len(names) for names, _ in panels.values())
    figure = new_figure(10.5, 0.26 * number + 1.2)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, (names, found)) in zip(axes, panels.items(), strict=True):
        places = np.arange(len(names))
        low, high = np.nan_to_num(found.low, neginf=0.0), np.nan_to_num(found.high, posinf=0.0)
        for place, mean, left, right in zip(places, found.mean, low, high, strict=True):
            shade = "tab:green" if right < 0 else "tab:red" if left > 0 else "dimgray"
            axis.plot(np.exp([left, right]), [place, place], color=shade, linewidth=1.6)
            axis.plot(np.exp(mean), place, "o", color=shade, markersize=5)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_yticks(places, names, fontsize=8)
        axis.set_xlabel("ratio to plain training")
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()
    save(figure, path)


def gaps(path: Path, results: Results) -> None:
    """What the expert of every interval changes: mean over the seeds, and each seed as a point.

    Args:
        path: the picture file.
        results: what to draw, with gaps.
    """
    early = results.transfer_ratios(results.plan.equal_exposure)
    late = results.transfer_ratios()
    groups = {"equal iterations": late, "equal exposure": early}
    drawn = {name: values for name, values in groups.items() if values is not None}
    edges = next(iter(results.gaps.values()))["boundaries"]
    names = [f"{first}–{end - 1}" for first, end in pairwise(edges)]
    figure = new_figure(6.6, 3.4)
    axis = figure.subplots()
    places, width = np.arange(len(names)), 0.8 / len(drawn)
    for j, ((name, values), shade) in enumerate(zip(drawn.items(), colours(2), strict=False)):
        middle = places + (j - (len(drawn) - 1) / 2) * width
        factors = np.exp(values.mean(1))
        axis.bar(middle, factors - 1.0, 0.9 * width, bottom=1.0, color=shade, alpha=0.8, label=name)
        for offset, of_seed in zip(
            np.linspace(-0.2, 0.2, values.shape[1]) * width, np.exp(values.T), strict=True
        ):
            axis.plot(middle + offset, of_seed, "o", color="black", markersize=3)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xticks(places, names)
    axis.set_xlabel("timesteps of the expert")
    axis.set_ylabel("Fréchet distance with the expert\nover that of plain training")
    axis.set_title("a point per seed; below 1: the expert is better", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(axis="y", alpha=0.25, which="both")
    axis.set_axisbelow(True)
    save(figure, path)


def clusters(path: Path, boundaries: dict[str, np.ndarray]) -> None:
    """The intervals of every clustering, against the timestep.

    Args:
        path: the picture file.
        boundaries: int64 [K + 1] by name.
    """
    figure = new_figure(7.0, 0.45 * len(boundaries) + 0.9)
    axis = figure.subplots()
    for place, edges in enumerate(boundaries.values()):
        shades = colours(len(edges) - 1)
        for (first, end), shade in zip(pairwise(edges.tolist()), shades, strict=True):
            axis.barh(place, end - first, left=first, color=shade, edgecolor="white", height=0.75, alpha=0.8)
    axis.set_yticks(np.arange(len(boundaries)), list(boundaries))
    axis.invert_yaxis()
    axis.set_xlim(0, max(int(edges[-1]) for edges in boundaries.values()))
    axis.set_xlabel("timestep t")
    save(figure, path)
