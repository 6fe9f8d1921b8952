"""Clusters and costs by name, and numbers from files, as a command line or a configuration gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np

from .continuous import NoiseClustering, cluster_noise
from .costs import AbsoluteDeviation, Affinity, Cost, SquaredDeviation
from .distributions import NoiseDistribution
from .intervals import IntervalClustering
from .solve import NumClusters, cluster_intervals

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


def named_clusters(
    cost: str,
    k: NumClusters,
    values: np.ndarray,
    *,
    min_size: int | None = None,
    max_size: int | None = None,
    distribution: NoiseDistribution | None = None,
) -> IntervalClustering | NoiseClustering:
    """The clusters of least cost, of timesteps or of continuous levels.

    Args:
        cost: its name; see `named_cost`.
        k: number of clusters, or ``"auto"``.
        values: as of `named_cost`. Of continuous levels, which are T cells of equal probability, those of affinity
            alone matter.
        min_size: fewest timesteps in a cluster.
        max_size: most timesteps in a cluster.
        distribution: of continuous levels; None for timesteps.

    Raises:
        ValueError: the clusters cannot be formed as asked.
    """
    if distribution is not None and cost != "affinity":
        number = len(values)
        return cluster_noise(
            distribution,
            k,
            cost="quantile" if cost == "timestep" else "absolute",
            min_probability=(min_size or 0) / number,
            max_probability=1.0 if max_size is None else max_size / number,
        )
    found = cluster_intervals(named_cost(cost, values), k=k, min_size=min_size, max_size=max_size)
    return found if distribution is None else NoiseClustering(distribution, found.probabilities)


def load_affinity(path: str | Path, num_timesteps: int) -> np.ndarray:
    """The task affinities [T, T] in a file; see `load_values`.

    Raises:
        ValueError: the file holds none, or those of another number of timesteps.
    """
    affinity = load_values(path)
    if affinity.shape != (num_timesteps, num_timesteps):
        raise ValueError(f"expected [T, T] with T = {num_timesteps}, found {list(affinity.shape)}")
    return affinity


def load_values(path: str | Path) -> np.ndarray:
    """Numbers from a .npy file or from nested lists in a .json file, as float64 (a float32 .npy stays float32).

    Raises:
        ValueError: the file cannot be read, has another suffix or no numbers in it.
    """
    path = Path(path)
    try:
        array = _read_array(path)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"found {array.dtype}")
        return array if array.dtype == np.float32 else array.astype(np.float64)
    except (OSError, MemoryError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot read {path} ({error})") from error
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"cannot read {path}: expected an array of numbers ({error})") from error


def _read_array(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        # Not np.load, which also opens archives and whatever else begins like one.
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    if path.suffix == ".json":
        return np.asarray(json.loads(path.read_text(encoding="utf-8")))
    raise ValueError("the suffix is neither .npy nor .json")
