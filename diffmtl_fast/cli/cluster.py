"""``diffmtl-fast cluster``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .._errors import UserError, blame
from .._number_types import Number, PositiveInt, Size
from ..clustering import IntervalClustering, cluster_intervals, cluster_path
from ..clustering.inputs import load_affinity, named_cost
from ..diffusion.named_schedules import SCHEDULES, read_log_snr
from ..run import plots
from ..run.titles import COST_TITLES
from .output import columns, writing

K_MAX = 20


def cluster(
    scheduler: str = SCHEDULES[0],
    timesteps: Size = 1000,
    k: PositiveInt | Literal["auto"] = 5,
    k_max: PositiveInt | None = None,
    cost: Literal["snr", "squared", "timestep", "affinity"] = "snr",
    affinity: str | None = None,
    min_size: PositiveInt | None = None,
    max_size: PositiveInt | None = None,
    clip: list[Number] | None = None,
    json: bool = False,
    plot: str | None = None,
) -> None:
    """Group the timesteps of a noise schedule into intervals of least cost.

    Args:
        scheduler: squaredcos_cap_v2, linear, scaled_linear, or a .npy or .json file of log-SNR [T]
        timesteps: T of a named schedule
        k: number of clusters, or auto: chosen from the cost curve
        k_max: most clusters that auto considers; 20 if not given
        cost: what the clusters hold together: log-SNR (absolute or squared deviation), timestep or task affinity
        affinity: .npy or .json file with the T x T task affinities, for cost affinity
        min_size: fewest timesteps of a cluster
        max_size: most timesteps of a cluster
        clip: bounds of the log-SNR, such as [-20, 20], for schedules that end in pure noise
        json: print JSON, not a table
        plot: picture file of the clusters, with --k auto of the cost curve too
    """
    if clip is not None and not (len(clip) == 2 and clip[0] < clip[1]):
        raise UserError(f"clip: expected [low, high] with low < high, found {clip}")
    with blame("scheduler"):
        levels = read_log_snr(scheduler, timesteps, clip)
    with blame("affinity"):
        values = levels if affinity is None else load_affinity(affinity, len(levels))
    if (cost == "affinity") != (affinity is not None):
        raise UserError(
            "affinity: expected a .npy or .json file with cost affinity and none with another cost"
        )
    if k != "auto" and k_max is not None:
        raise UserError(f"k_max: expected none without --k auto, found {k_max}")
    path = None
    with blame("clusters"):
        summed = named_cost(cost, values)
        if k == "auto":
            path = cluster_path(
                summed, K_MAX if k_max is None else k_max, min_size=min_size, max_size=max_size
            )
            found = path.chosen
        else:
            found = cluster_intervals(summed, k=k, min_size=min_size, max_size=max_size)
    if plot is not None:
        title = f"{found.k} {COST_TITLES[cost]} clusters, {scheduler}"
        with writing("plot", Path(plot)) as aside, blame("plot", (ValueError,)):
            plots.clusters(aside, found, levels, title, path)
    if json:
        curve = {} if path is None else {"path": {"k": path.ks.tolist(), "cost": path.costs.tolist()}}
        print(as_json(found, scheduler=scheduler, objective=cost, **curve))
    else:
        print(table(found, levels))


def as_json(clusters: IntervalClustering, **more: object) -> str:
    """The clustering as JSON, with its sizes and what else is passed."""
    return json.dumps({**more, "k": clusters.k, "sizes": clusters.sizes.tolist(), **clusters.to_dict()})


def table(clusters: IntervalClustering, log_snr: NDArray[np.float64]) -> str:
    """One line per cluster: its timesteps, its size and the range of the log-SNR [T]."""
    rows = [["cluster", "timesteps", "size", "log-SNR"]]
    for j, (l, e) in enumerate(itertools.pairwise(clusters.boundaries.tolist())):
        rows.append([str(j), f"{l}–{e - 1}", str(e - l), f"{log_snr[l]:.4g} … {log_snr[e - 1]:.4g}"])
    return f"{columns(rows)}\ncost {clusters.cost:.9g}"
