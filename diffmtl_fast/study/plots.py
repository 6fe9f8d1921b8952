"""The pictures of a study."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras import require
from .._figures import colours, new_figure, save
from .plan import STUDIED, VANILLA, Variant
from .results import Axis, Results
from .statistics import Differences

_LABELS = {"steps": "iteration", "calibrated": "training time (plain steps)"}
_STYLES = ("-", "--", ":")
_BELOW, _ABOVE, _UNDECIDED = "tab:green", "tab:red", "dimgray"


def curves(path: Path, results: Results) -> None:
    """Fréchet distance against steps and against calibrated time: geometric mean over the seeds, and their range.

    Args:
        path: the picture file.
        results: what to draw.
    """
    panels = _panels(results)
    figure = new_figure(8.4, 2.3 * len(panels) + 0.4)
    axes = figure.subplots(len(panels), 2, sharex="col", sharey=True, squeeze=False)
    axis_names: tuple[Axis, ...] = ("steps", "calibrated")
    for row, (title, kinds) in zip(axes, panels.items(), strict=True):
        for axis, place in zip(row, axis_names, strict=True):
            _curve(axis, results, VANILLA, place, "black", "-")
            chosen = [v for v in results.cases() if v.kind in kinds and v != VANILLA]
            for variant, shade, style in zip(chosen, colours(max(len(chosen), 1)), _STYLES, strict=False):
                _curve(axis, results, variant, place, shade, style)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(_some_labels())
            axis.grid(alpha=0.25, which="both")
            axis.set_title(title if place == "steps" else "", fontsize=10)
        row[0].set_ylabel("Fréchet distance")
        row[1].legend(fontsize=9, frameon=False)
    for axis, place in zip(axes[-1], axis_names, strict=True):
        axis.set_xlabel(_LABELS[place])
    save(figure, path)


def _panels(results: Results) -> dict[str, tuple[str, ...]]:
    """The panels of the curves, each beside plain training: their titles, and kinds of variants."""
    panels: dict[str, tuple[str, ...]] = {method.title: (method.name,) for method in STUDIED}
    panels["curricula"] = ("easy_to_hard", "hard_to_easy")
    others = [variant for variant in results.cases() if variant.family == "others"]
    for start in range(0, len(others), len(_STYLES)):
        row = others[start : start + len(_STYLES)]
        panels[", ".join(variant.method for variant in row)] = tuple(variant.kind for variant in row)
    cases = {variant.kind for variant in results.cases()}
    return {title: kinds for title, kinds in panels.items() if cases & {*kinds}} or {"": ()}


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
    """Ratios with their intervals on a logarithmic axis, a panel for each of several figures.

    Args:
        path: the picture file.
        panels: names of the cases and their mean log ratios, by title; two panels to a row.
    """
    number = max(len(names) for names, _ in panels.values())
    rows = -(-len(panels) // 2)
    figure = new_figure(8.4, rows * (0.25 * number + 0.9) + 0.4)
    axes = figure.subplots(rows, 2, sharex="row", squeeze=False)
    for axis, (title, (names, found)) in zip(axes.flat, panels.items(), strict=True):
        for place, (mean, low, high) in enumerate(zip(found.mean, found.low, found.high, strict=True)):
            shade = _BELOW if found.below[place] else _ABOVE if found.above[place] else _UNDECIDED
            if np.isfinite(high - low):
                axis.plot(np.exp([low, high]), [place, place], color=shade, linewidth=1.8)
            axis.plot(np.exp(mean), place, "o", color=shade, markersize=5)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_ylim(number - 0.5, -0.5)
        first = axis is axes.flat[0] or axis.get_subplotspec().is_first_col()
        axis.set_yticks(np.arange(len(names)), names if first else [], fontsize=9)
        axis.set_xlabel("ratio to plain training, logarithmic axis")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.25)
    for row in axes:
        _label_ratios(row[0])  # the panels of a row share their axis
    line = require("matplotlib.lines", "train").Line2D
    meanings = {_BELOW: "below 1: better, faster", _ABOVE: "above 1: worse, slower", _UNDECIDED: "undecided"}
    handles = [
        line([], [], color=shade, marker="o", markersize=5, label=text) for shade, text in meanings.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save(figure, path)


def _label_ratios(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, or closer ones where the axis is short."""
    ticker = require("matplotlib.ticker", "train")
    low, high = axis.get_xlim()
    wide = high > 4 * low
    axis.xaxis.set_major_locator(
        ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=8) if wide else ticker.MaxNLocator(5)
    )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(ticker.NullLocator())


def samples(path: Path, pictures: dict[str, Tensor]) -> None:
    """Pictures of every method, a row each and a column for each class.

    Args:
        path: the picture file.
        pictures: float [N, C, H, W] in [-1, 1], by title, all of the same shape.
    """
    images = ((torch.stack([*pictures.values()]).clamp(-1, 1) + 1) / 2).movedim(2, -1)
    rows, columns, height, width, channels = images.shape
    margin = max(1, width // 8)
    mosaic = torch.ones(rows, height + margin, columns, width + margin, channels)
    mosaic[:, :height, :, :width] = images.movedim(1, 2)
    mosaic = mosaic.reshape(rows * (height + margin), columns * (width + margin), channels)
    # The height leaves room, so that it is the width that the pictures and their titles fill.
    figure = new_figure(0.5 * columns + 2.2, 0.56 * rows * (height + margin) / (width + margin) + 0.2)
    axis = figure.subplots()
    axis.imshow(mosaic.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks((np.arange(rows) + 0.5) * (height + margin) - margin / 2, pictures, fontsize=10)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
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
