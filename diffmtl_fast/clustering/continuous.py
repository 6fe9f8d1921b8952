"""Clusterings of continuous noise levels: EDM's σ, the times of flow matching."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .._host import on_host
from .costs import AbsoluteDeviation, SquaredDeviation, as_integer
from .distributions import DISTRIBUTIONS, NoiseDistribution
from .drawing import hand_over, places, random_integers
from .intervals import IntervalClustering, stratified_clusters
from .solve import NumClusters, cluster_intervals

NoiseCost: TypeAlias = Literal["quantile", "absolute", "squared"]

_TOLERANCE = 1e-9  # of a limit on probabilities, so that 1 / 3 allows three clusters
_DRAW_RANGE = 2**53  # every midpoint of these many cells of (0, 1) is a float64, or rounds to one


@dataclass(frozen=True, eq=False, repr=False)
class NoiseClustering:
    """K contiguous intervals that cover a distribution of noise levels.

    Args:
        distribution: of the levels in training.
        probabilities: float64 [K + 1], strictly increasing from 0 to 1; cluster j holds the levels between
            the quantiles of ``probabilities[j]`` and ``probabilities[j + 1]``. Stored as a read-only copy.
        cost: mean cost of a level drawn from the distribution, or NaN if none was minimised.

    Raises:
        ValueError: probabilities are not strictly increasing from 0 to 1.
    """

    distribution: NoiseDistribution
    probabilities: np.ndarray
    cost: float = math.nan
    _on_device: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        values = np.array(self.probabilities, dtype=np.float64)
        if (
            values.ndim != 1
            or values.size < 2
            or values[0] != 0
            or values[-1] != 1
            or not (np.diff(values) > 0).all()
        ):
            raise ValueError(
                f"probabilities: expected strictly increasing from 0 to 1, found {values.tolist()}"
            )
        values.flags.writeable = False
        object.__setattr__(self, "probabilities", values)
        object.__setattr__(self, "cost", float(self.cost))

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.probabilities) - 1

    @property
    def edges(self) -> np.ndarray:
        """Noise levels between the clusters, float64 [K + 1]; the ends of the distribution included."""
        return self.distribution.quantile(torch.from_numpy(self.probabilities.copy())).numpy()

    def assign(self, level: Tensor) -> Tensor:
        """Cluster index of every noise level.

        Args:
            level: floating point, any shape and device. Levels outside the distribution's range get the
                nearest cluster; a level on an edge gets the upper one.

        Returns:
            int64, same shape and device.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: a NaN on the CPU. On other devices the check would wait for the device, so there NaN
                gets some cluster.
        """
        if not isinstance(level, Tensor):
            raise TypeError(f"level: expected a floating-point tensor, found {type(level).__name__}")
        if not level.is_floating_point():
            raise TypeError(f"level: expected a floating-point tensor, found {level.dtype}")
        if on_host(level) and level.isnan().any():
            raise ValueError("level: expected noise levels, found NaN")
        return torch.bucketize(level, self._edges(level.device, level.dtype)[1:-1], right=True)

    def sample(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        rank: int | None = None,
        world_size: int | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draw a stratified batch; within each cluster levels follow the training distribution.

        Args:
            batch_size: number of levels, at least 1.
            device: where the batch goes; by default the generator's device, or the CPU.
            generator: source of randomness, on the CPU or on the device; by default the CPU's global one. What is
                drawn on the CPU spares an accelerator's training step a host synchronisation: see
                `ClusteredMTL.forward`.
            dtype: of the levels; drawn in float64, then rounded within their cluster.
            rank: of this process, to draw from its own clusters alone; see :meth:`IntervalClustering.sample`.
            world_size: number of processes, given with `rank`.
            step: number of the step, the same on all ranks.

        Returns:
            Levels and their clusters [batch_size], sorted by cluster; see :meth:`IntervalClustering.sample`.

        Raises:
            ValueError: ``batch_size < 1``, a generator on another device, or no such rank.
        """
        target, source = places(device, generator)
        cluster = stratified_clusters(self.k, batch_size, source, generator, rank, world_size, step)
        level = self.draw(cluster, cluster + 1, generator=generator, dtype=dtype)
        return hand_over(level, cluster, target)

    def draw(
        self,
        first: Tensor,
        last: Tensor,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw levels of the training distribution between two boundaries each.

        Args:
            first: int64 [B], index of the lower boundary, 0 … K - 1.
            last: int64 [B], index of the upper boundary, above ``first``.
            generator: source of randomness, on the CPU or on their device; by default the device's global one.
            dtype: of the levels; drawn in float64, then rounded within the boundaries.

        Returns:
            Levels [B], ``edges[first] <= level < edges[last]``.
        """
        draw = random_integers(_DRAW_RANGE, first.shape, first.device, generator)
        share = (draw.double() + 0.5) / _DRAW_RANGE
        ends = self._probabilities(first.device)
        low, high = ends[first], ends[last]
        probability = (low + share * (high - low)).clamp(2.0**-60, 1.0 - 2.0**-53)
        level = self.distribution.quantile(probability).to(dtype)
        edges = self._edges(first.device, dtype)
        below = torch.nextafter(edges, edges.new_full((), -math.inf))
        return torch.minimum(torch.maximum(level, edges[first]), below[last])

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; :meth:`from_dict` reads them back."""
        return {
            "distribution": {"name": self.distribution.name, **_settings(self.distribution)},
            "probabilities": self.probabilities.tolist(),
            "cost": None if math.isnan(self.cost) else self.cost,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> NoiseClustering:
        """The clustering that :meth:`to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or a value is not valid.
        """
        if set(state) != {"distribution", "probabilities", "cost"}:
            raise ValueError(f"expected the keys distribution, probabilities and cost, found {sorted(state)}")
        parameters = dict(state["distribution"])
        name = parameters.pop("name", None)
        if name not in DISTRIBUTIONS:
            raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, found {name!r}")
        expected = {parameter.name for parameter in fields(DISTRIBUTIONS[name])}
        if not expected - {"data_at"} <= set(parameters) <= expected:
            raise ValueError(
                f"distribution: expected the parameters {sorted(expected)} of {name}, found {sorted(parameters)}"
            )
        cost = math.nan if state["cost"] is None else state["cost"]
        return cls(DISTRIBUTIONS[name](**parameters), np.asarray(state["probabilities"]), cost)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, NoiseClustering) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        edges = " | ".join(f"{edge:.4g}" for edge in self.edges)
        cost = "" if math.isnan(self.cost) else f", cost={self.cost:.6g}"
        return f"NoiseClustering({self.distribution}, k={self.k}{cost}: {edges})"

    def __reduce__(self) -> tuple[type[NoiseClustering], tuple[NoiseDistribution, np.ndarray, float]]:
        return NoiseClustering, (self.distribution, self.probabilities, self.cost)

    def _key(self) -> tuple[NoiseDistribution, bytes, str]:
        return self.distribution, self.probabilities.tobytes(), self.cost.hex()

    def _edges(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Edges [K + 1] on the device, rounded to the dtype."""
        if (device, dtype) not in self._on_device:
            self._on_device[device, dtype] = torch.tensor(self.edges.tolist(), dtype=torch.float64).to(
                device, dtype
            )
        return self._on_device[device, dtype]

    def _probabilities(self, device: torch.device) -> Tensor:
        """Probabilities [K + 1] on the device; kept under a dtype that no level has."""
        key = (device, torch.int64)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self.probabilities.tolist(), dtype=torch.float64).to(device)
        return self._on_device[key]


def _settings(distribution: NoiseDistribution) -> dict[str, Any]:
    """A distribution's parameters; ``data_at`` where it is not 0."""
    return {name: value for name, value in asdict(distribution).items() if name != "data_at" or value}


def cluster_noise(
    distribution: NoiseDistribution,
    k: NumClusters,
    *,
    cost: NoiseCost = "absolute",
    resolution: int = 100_000,
    min_probability: float = 0.0,
    max_probability: float = 1.0,
) -> NoiseClustering:
    """Cluster the noise levels of a training distribution.

    ``"quantile"``: equal probabilities (for EDM: ln σ ∈ mean + std · Φ⁻¹(j / K)). ``"absolute"``: least
    E |s − s_c|, s the log-SNR and s_c its median in the cluster, the expectation over the distribution;
    ``"squared"``: least E (s − mean)². The latter two replace the distribution by its quantiles at the
    midpoints of ``resolution`` cells of equal probability and are exact for these.

    Args:
        distribution: of the levels in training.
        k: number of clusters, or ``"auto"`` (not for quantiles; see :class:`ClusterPath`).
        cost: what to minimise.
        resolution: number of cells.
        min_probability: least probability of a cluster, 0 … 1, met to within one cell.
        max_probability: largest probability of a cluster, 0 … 1, met to within one cell.

    Returns:
        The clustering, its cost a mean over the distribution.

    Raises:
        TypeError: not one of this module's distributions, or ``k`` or ``resolution`` is no integer.
        ValueError: unknown cost, or ``k`` or a limit cannot be met.
    """
    if not isinstance(distribution, tuple(DISTRIBUTIONS.values())):
        expected = ", ".join(kind.__name__ for kind in DISTRIBUTIONS.values())
        raise TypeError(f"distribution: expected one of {expected}, found {distribution!r}")
    resolution = as_integer(resolution, "resolution")
    k = k if isinstance(k, str) else as_integer(k, "k")
    if not 0 <= min_probability <= max_probability <= 1:
        raise ValueError(
            f"expected 0 <= min_probability <= max_probability <= 1, found {min_probability} and {max_probability}"
        )
    if not isinstance(k, str):
        _check_share(k, min_probability, max_probability)
    if cost == "quantile":
        if isinstance(k, str):
            raise ValueError(f"k: expected an integer for quantiles, found {k!r}")
        return NoiseClustering(distribution, np.linspace(0.0, 1.0, k + 1))
    costs: dict[str, type[AbsoluteDeviation] | type[SquaredDeviation]] = {
        "absolute": AbsoluteDeviation,
        "squared": SquaredDeviation,
    }
    if cost not in costs:
        raise ValueError(f"cost: expected quantile, absolute or squared, found {cost!r}")
    least = 1 if isinstance(k, str) else k
    if resolution < least:
        raise ValueError(f"resolution: expected at least {least} cells, found {resolution}")
    values = distribution.log_snr(middle_levels(distribution, resolution))
    found = cluster_intervals(
        costs[cost](values, "log_snr"),
        resolution,
        k,
        min_size=max(1, math.floor((min_probability + _TOLERANCE) * resolution)),
        max_size=max(1, math.ceil((max_probability - _TOLERANCE) * resolution)),
    )
    return NoiseClustering(distribution, found.boundaries / resolution, found.cost / resolution)


def in_timesteps(clusters: IntervalClustering | NoiseClustering, num_timesteps: int) -> IntervalClustering:
    """Clusters as intervals of timesteps; those of continuous levels rounded to T cells of equal probability."""
    if isinstance(clusters, IntervalClustering):
        return clusters
    return IntervalClustering(np.rint(clusters.probabilities * num_timesteps).astype(np.int64))


def middle_levels(distribution: NoiseDistribution, cells: int) -> Tensor:
    """The medians of cells of equal probability, float64 [cells], rising."""
    return distribution.quantile((torch.arange(cells, dtype=torch.float64) + 0.5) / cells)


def _check_share(k: int, least: float, most: float) -> None:
    """Refuse a number of clusters whose equal share 1 / k the limits exclude."""
    if k < 1:
        raise ValueError(f"k: expected an integer of at least 1, found {k}")
    if not (least - _TOLERANCE) * k <= 1 <= (most + _TOLERANCE) * k:
        raise ValueError(
            f"expected min_probability <= 1 / k = {1 / k:.6g} <= max_probability, found {least} and {most}"
        )
