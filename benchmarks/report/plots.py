"""Pictures of what was measured: ratio bars, growth curves, roofline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.names import OURS, TYPICAL_K, Group
from diffmtl_fast._figures import new_figure, save
from diffmtl_fast._files import replacing

from .goals import bandwidths, share
from .results import Comparison, Machine, Role
from .tables import ratio_text

COLOURS: dict[Role, str] = {
    "ours": "tab:blue",
    "reference": "0.25",
    "baseline": "tab:orange",
    "peer": "tab:red",
    "limit": "0.7",
}
STYLES = ("-", "--", ":", "-.")

#: what the pictures show, as text for those who cannot see them
CAPTIONS = {
    "step_ratios.png": "Time of a training step over that of the plain step",
    "step_growth.png": "Time of a training step over that of the plain step, against the number of clusters",
    "clustering_growth.png": "Time of interval clustering against T and k",
    "roofline.png": "Bandwidth of every op, over that of the memory",
}


def captions(folder: Path, names: Sequence[str], beside: Path) -> dict[str, str]:
    """Return the pictures of some machines, as paths relative to a file's folder, and what they show.

    Args:
        folder: where the pictures of every one of them have a folder of their own.
        names: of the machines.
        beside: the folder of the file that shows them.
    """
    return {
        Path(os.path.relpath(folder / name / picture, beside)).as_posix(): caption
        for name in names
        for picture, caption in CAPTIONS.items()
        if (folder / name / picture).exists()
    }


def draw(machine: Machine, folder: Path) -> list[Path]:
    """Draw the pictures for which the machine's runs have figures.

    Args:
        machine: with what its runs measured.
        folder: where the pictures go; exists.

    Returns:
        The files.
    """
    made = []
    for name, plot in PLOTS.items():
        figure = plot(machine)
        if figure is not None:
            path = folder / name
            with replacing(path) as aside:
                save(figure, aside)
            made.append(path)
    return made


def ratios(machine: Machine) -> Any | None:
    """Bars of the time of a training step over the plain step's, a panel per model at the typical K."""
    chosen = [c for c in machine.comparisons if c.group == Group.STEP and c.parameters.get("k") == TYPICAL_K]
    return _bars(chosen, machine.title) if chosen else None


def _bars(comparisons: Sequence[Comparison], machine: str) -> Any:
    names = list(dict.fromkeys(way.name for c in comparisons for way in c.ways))
    roles = {way.name: way.role for c in comparisons for way in c.ways}
    figure = new_figure(2.6 + 2.2 * len(comparisons), 0.3 * len(names) + 1.2)
    axes = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
    for axis, comparison in zip(axes, comparisons, strict=True):
        for place, name in enumerate(names):
            if name not in comparison:
                continue
            found = comparison.ratio(comparison[name])
            error = [[found.median - found.low], [found.high - found.median]]
            axis.barh(place, found.median, xerr=error, color=COLOURS[roles[name]], error_kw={"lw": 0.8})
            if name != comparison.yardstick.name:
                axis.annotate(
                    ratio_text(comparison, found),
                    (found.high, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        # With room for the figures.
        axis.set_xlim(0, 1.25 * max(comparison.ratio(way).high for way in comparison.ways))
        noise = comparison.noise
        axis.axvspan(1 / (1 + noise), 1 + noise, color="0.85", zorder=0)  # ratios in it show no difference
        axis.axvline(1, color="black", lw=0.8, ls="--")
        axis.set(
            title=comparison.case.replace(", batch", "\nbatch"), xlabel=f"time / {comparison.yardstick.name}"
        )
        axis.title.set_fontsize(9)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(f"{machine}; grey: the noise", fontsize=9)
    return figure


def growth(machine: Machine) -> Any | None:
    """Time of interval clustering over T at the most frequent k, and over k at the most frequent T."""
    chosen = [c for c in machine.comparisons if c.parameters.get("cost") == "deviation"]
    return _growth(chosen, machine.title) if chosen else None


def growth_of_steps(machine: Machine) -> Any | None:
    """Time of a training step over the plain step's against K, at the first batch size of every model."""
    steps = [c for c in machine.comparisons if c.group == Group.STEP]
    titles = list(dict.fromkeys(c.parameters["title"] for c in steps if c.parameters["k"] != TYPICAL_K))
    if not titles:
        return None
    figure = new_figure(2.5 * len(titles) + 2.6, 3.8)
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axis, title in zip(axes, titles, strict=True):
        mine = [c for c in steps if c.parameters["title"] == title]
        batch = mine[0].parameters["batch"]
        _lines(axis, [c for c in mine if c.parameters["batch"] == batch], "k", _over_the_yardstick)
        axis.set(title=title, xlabel="clusters K")
        _ticks_at(axis, [c.parameters["k"] for c in mine])
    axes[0].set_ylabel("time of a step / plain step")
    ratios = (1, 2, 4, 8, 16)
    axes[0].set_yticks(ratios, [str(ratio) for ratio in ratios])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", handlelength=3, frameon=False, fontsize=8)
    figure.suptitle(machine.title, fontsize=9)
    return figure


def _growth(comparisons: Sequence[Comparison], machine: str) -> Any | None:
    figure = new_figure(9, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    drawn = False
    for axis, along, fixed in ((axes[0], "T", "k"), (axes[1], "k", "T")):
        value = _most_frequent([c.parameters[fixed] for c in comparisons])
        mine = [c for c in comparisons if c.parameters[fixed] == value]
        drawn |= _lines(axis, mine, along, _seconds)
        axis.set(xlabel=f"{along} ({fixed} = {value:,})")
    _ticks_at(axes[1], [c.parameters["k"] for c in comparisons if c.parameters["T"] == value])
    if not drawn:
        return None
    axes[0].set_ylabel("seconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, handlelength=3, frameon=False, fontsize=8
    )
    figure.suptitle(f"{machine}: timesteps T, clusters k", fontsize=9)
    return figure


def _ticks_at(axis: Any, ks: Sequence[int]) -> None:
    """Label a logarithmic axis where there are points, not at powers of ten and between."""
    axis.set_xticks(sorted(set(ks)), map(str, sorted(set(ks))))
    axis.minorticks_off()


def _most_frequent(values: Sequence[int]) -> int:
    return max(sorted(set(values)), key=values.count)


def _lines(
    axis: Any, comparisons: Sequence[Comparison], along: str, value: Callable[[Comparison, str], float]
) -> bool:
    """Draw a curve for every way that has two points at least; return whether there was one."""
    counts: dict[Role, int] = {}
    drawn = False
    roles = {way.name: way.role for c in comparisons for way in c.ways}
    for name, role in roles.items():
        points = sorted((c.parameters[along], value(c, name)) for c in comparisons if name in c)
        if len(points) < 2:
            continue
        style = STYLES[counts.get(role, 0) % len(STYLES)]
        counts[role] = counts.get(role, 0) + 1
        axis.loglog(*zip(*points, strict=True), style, color=COLOURS[role], marker=".", label=name)
        drawn = True
    axis.grid(alpha=0.25)
    return drawn


def _seconds(comparison: Comparison, name: str) -> float:
    return comparison[name].time.median


def _over_the_yardstick(comparison: Comparison, name: str) -> float:
    return comparison.ratio(comparison[name]).median


def roofline(machine: Machine) -> Any | None:
    """Bars of the share of the memory's speed that every op reaches, beside the plain and the compiled one.

    The figures on the right are GB/s, ours of the yardstick's.
    """
    chosen = [c for c in machine.comparisons if c.parameters.get("bytes")]
    if not chosen:
        return None
    dtypes = sorted({c.parameters["dtype"] for c in chosen}, reverse=True)
    names = list(dict.fromkeys(c.parameters["op"] for c in chosen))
    figure = new_figure(4.2 * len(dtypes) + 1.4, 0.42 * len(names) + 1.6)
    axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        labels: set[str] = set()
        for comparison in chosen:
            if comparison.parameters["dtype"] == dtype:
                _shares(axis, comparison, names.index(comparison.parameters["op"]), labels)
        axis.axvline(1, color="black", lw=0.8, ls="--")
        axis.set_xlim(0, 1.3 * axis.get_xlim()[1])  # room for the GB/s
        axis.set(title=dtype, xlabel="bandwidth / that of the memory")
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    # One legend for all, where there is room: what only one of them has is in it too.
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    figure.suptitle(
        f"{machine.title}; losses forward and backward unless said; right: GB/s, ours of the memory's",
        fontsize=9,
    )
    return figure


def _shares(axis: Any, comparison: Comparison, place: int, labels: set[str]) -> None:
    for offset, role in ((-0.27, "ours"), (0.0, "baseline"), (0.27, "reference")):
        for way in _of(comparison, role):
            found = share(comparison, way)
            error = [[found.median - found.low], [found.high - found.median]]
            label = {
                "ours": OURS,
                "baseline": "by a compiler or hand",
                "reference": "plain PyTorch; of PCGrad, the published loop",
            }[role]
            axis.barh(
                place + offset,
                found.median,
                0.27,
                xerr=error,
                color=COLOURS[role],  # type: ignore[index]
                label=None if label in labels else label,
                error_kw={"lw": 0.8},
            )
            labels.add(label)
            if role == "ours":
                axis.text(
                    0.99,
                    place,
                    bandwidths(comparison, way),
                    transform=axis.get_yaxis_transform(),
                    ha="right",
                    va="center",
                    fontsize=8,
                )


def _of(comparison: Comparison, role: str) -> Iterator[str]:
    return (way.name for way in comparison.ways if way.role == role)


#: file name to what is drawn in it
PLOTS: dict[str, Callable[[Machine], Any | None]] = {
    "step_ratios.png": ratios,
    "step_growth.png": growth_of_steps,
    "clustering_growth.png": growth,
    "roofline.png": roofline,
}
