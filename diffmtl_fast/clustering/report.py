"""What the command line and notebooks show of a clustering: a table, plain values, a plot of the cost curve."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from .._extras import require
from .costs import AbsoluteDeviation, Affinity, Cost, SquaredDeviation
from .intervals import IntervalClustering
from .path import ClusterPath

CostName: TypeAlias = Literal["timestep", "snr", "squared", "affinity"]


def named_cost(name: str, values: np.ndarray) -> Cost:
    """The cost of a name, on values from a scheduler or a file.

    Args:
        name: ``"timestep"`` (of the values only their number matters), ``"snr"`` (L1), ``"squared"`` or
            ``"affinity"``.
        values: [T], or [T, T] for affinity.

    Raises:
        ValueError: unknown name, or values of the wrong shape.
    """
    if name not in get_args(CostName):
        raise ValueError(f"cost: expected one of {', '.join(get_args(CostName))}, found {name!r}")
    if name == "affinity":
        return Affinity(values)
    if values.ndim != 1:
        raise ValueError(f"{name} cost: expected one value per timestep, found shape {list(values.shape)}")
    if name == "timestep":
        return AbsoluteDeviation(np.arange(len(values), dtype=np.float64), "timestep")
    return AbsoluteDeviation(values, "log_snr") if name == "snr" else SquaredDeviation(values, "log_snr")


def load_values(path: str | Path) -> np.ndarray:
    """Numbers from a .npy file or from nested lists in a .json file, as float64 (a float32 .npy stays float32).

    Raises:
        ValueError: another suffix, or no numbers in it.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        array = _read_array(path)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"found {array.dtype}")
        return array if array.dtype == np.float32 else array.astype(np.float64)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: expected an array of numbers ({error})") from error


def _read_array(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        # Not np.load, which also opens archives and whatever else begins like one.
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    if path.suffix == ".json":
        return np.asarray(json.loads(path.read_text(encoding="utf-8")))
    raise ValueError("the suffix is neither .npy nor .json")


def as_dict(clusters: IntervalClustering, **extra: Any) -> dict[str, Any]:
    """The clustering as values that JSON can hold, with its sizes and what else is passed."""
    return {**extra, "k": clusters.k, "sizes": clusters.sizes.tolist(), **clusters.to_dict()}


def table(clusters: IntervalClustering, values: np.ndarray | None = None, label: str = "log-SNR") -> str:
    """One line per cluster: its timesteps, its size and, where given, the range of the values.

    Args:
        clusters: what to show.
        values: [T] values the clustering groups, or None.
        label: what the values are.
    """
    rows = [["cluster", "timesteps", "size", *([label] if values is not None else [])]]
    for j, (l, e) in enumerate(itertools.pairwise(clusters.boundaries.tolist())):
        span = [] if values is None else [f"{values[l]:.4g} … {values[e - 1]:.4g}"]
        rows.append([str(j), f"{l}–{e - 1}", str(e - l), *span])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"cost {clusters.cost:.9g}"])


def plot_path(path: ClusterPath, target: Any) -> None:
    """Plot cost against k, with the chosen k.

    Args:
        path: optimal clusterings for every k.
        target: matplotlib axes, or where to write the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if isinstance(target, str | Path):
        figure = require("matplotlib.figure", "train").Figure(figsize=(5.0, 3.2), layout="constrained")
        plot_path(path, figure.subplots())
        figure.savefig(target, dpi=150)
        return
    chosen = path.chosen
    target.plot(path.ks, path.costs, color="black", linewidth=1.6, marker=".", markersize=5)
    target.plot(
        [chosen.k],
        [chosen.cost],
        marker="o",
        color="tab:red",
        linestyle="none",
        label=f"chosen: k = {chosen.k}",
    )
    target.xaxis.set_major_locator(require("matplotlib.ticker", "train").MaxNLocator(integer=True))
    target.set_xlabel("number of clusters k")
    target.set_ylabel("optimal cost")
    target.legend(frameon=False)
