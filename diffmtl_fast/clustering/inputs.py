"""Costs by name and numbers from files, as a command line or a configuration gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np

from .costs import AbsoluteDeviation, Affinity, Cost, SquaredDeviation

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
