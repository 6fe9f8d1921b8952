"""The result of a clustering: contiguous intervals of timesteps, to look up and to sample from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._host import on_host
from .drawing import clusters_of_rank, hand_over, places, random_integers

# Uniform integers are drawn below this and reduced modulo an interval's size: the bias is below 2^-34.
_DRAW_RANGE = 2**62


@dataclass(frozen=True, eq=False, repr=False)
class IntervalClustering:
    """K contiguous, non-empty intervals that cover the timesteps 0 … T-1.

    Args:
        boundaries: int64 [K + 1], strictly increasing from 0 to T; cluster j is
            ``boundaries[j] <= t < boundaries[j + 1]``. Stored as a read-only copy.
        cost: sum of the interval costs, or NaN for intervals that were not found by minimising one.

    Raises:
        TypeError: boundaries are not integers.
        ValueError: boundaries are not strictly increasing from 0, or fewer than two.
    """

    boundaries: np.ndarray
    cost: float = math.nan
    # Tensors by device: a copy from the host in every training step would wait for the device.
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        given = np.asarray(self.boundaries)
        if given.dtype.kind not in "iu":
            raise TypeError(f"boundaries: expected integers, found {given.dtype}")
        if given.ndim != 1 or given.size < 2:
            raise ValueError(f"boundaries: expected shape [k + 1] with k >= 1, found {list(given.shape)}")
        boundaries = given.astype(np.int64)
        if boundaries[0] != 0 or (boundaries[1:] <= boundaries[:-1]).any():
            raise ValueError(f"boundaries: expected strictly increasing from 0, found {boundaries.tolist()}")
        boundaries.flags.writeable = False
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "cost", float(self.cost))

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.boundaries) - 1

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return int(self.boundaries[-1])

    @property
    def sizes(self) -> np.ndarray:
        """Timesteps per cluster, int64 [K]."""
        return np.diff(self.boundaries)

    @property
    def probabilities(self) -> np.ndarray:
        """Share of the timesteps below every boundary, float64 [K + 1]."""
        return self.boundaries / self.num_timesteps

    def assign(self, t: Tensor) -> Tensor:
        """Cluster index of every timestep.

        Args:
            t: integer timesteps in 0 … T-1, any shape and device.

        Returns:
            int64, same shape and device as ``t``.

        Raises:
            TypeError: ``t`` is no integer tensor.
            ValueError: a value on the CPU is out of range. On other devices the check would wait for the
                device, so there a value out of range gets the nearest cluster.
        """
        if not isinstance(t, Tensor):
            raise TypeError(f"t: expected an integer tensor, found {type(t).__name__}")
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t: expected an integer tensor, found {t.dtype}")
        if on_host(t) and t.numel():
            low, high = (int(bound) for bound in t.aminmax())
            if low < 0 or high >= self.num_timesteps:
                found = low if low < 0 else high
                raise ValueError(f"t: expected 0 <= t < T = {self.num_timesteps}, found {found}")
        return torch.bucketize(t, self._boundaries(t.device)[1:-1], right=True)

    def sample(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draw a stratified batch: the same number of timesteps in every cluster.

        ``batch_size // K`` timesteps are drawn uniformly in each cluster; the ``batch_size % K`` left over go
        to distinct clusters drawn at random, so every cluster expects ``batch_size / K``. Nothing waits for
        the device, and equal generator states give equal batches.

        Args:
            batch_size: number of timesteps, at least 1.
            device: where the batch goes; by default the generator's device, or the CPU.
            generator: source of randomness, on the CPU or on the device; by default the CPU's global one. What is
                drawn on the CPU spares an accelerator's training step a host synchronisation: see
                `ClusteredMTL.forward`.
            rank: of this process, to draw from its own clusters alone: ``ceil(K / world_size)`` of them, one where
                there are as many processes as clusters, and all of them in the processes together. `ClusteredMTL`
                then moves no more between processes than plain training does; see docs/distributed.md.
            world_size: number of processes, given with `rank`.
            step: number of the step, the same on all ranks: a rank's clusters change from one to the next.

        Returns:
            Timesteps and their clusters, both int64 [batch_size], sorted by cluster.

        Raises:
            ValueError: ``batch_size < 1``, a generator on another device, or no such rank.
        """
        target, source = places(device, generator)
        cluster = stratified_clusters(self.k, batch_size, source, generator, rank, world_size, step)
        return hand_over(self.draw(cluster, cluster + 1, generator=generator), cluster, target)

    def draw(self, first: Tensor, last: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw timesteps uniformly between two boundaries each.

        Args:
            first: int64 [B], index of the lower boundary, 0 … K - 1.
            last: int64 [B], index of the upper boundary, above ``first``.
            generator: source of randomness, on the CPU or on their device; by default the device's global one.

        Returns:
            int64 [B], ``boundaries[first] <= t < boundaries[last]``.
        """
        draw = random_integers(_DRAW_RANGE, first.shape, first.device, generator)
        boundaries = self._boundaries(first.device)
        low = boundaries[first]
        return low + draw % (boundaries[last] - low)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; :meth:`from_dict` reads them back."""
        return {
            "boundaries": self.boundaries.tolist(),
            "cost": None if math.isnan(self.cost) else self.cost,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> IntervalClustering:
        """The clustering that :meth:`to_dict` described.

        Raises:
            ValueError: a key is missing or unknown, or the boundaries are not valid.
        """
        if set(state) != {"boundaries", "cost"}:
            raise ValueError(f"expected the keys boundaries and cost, found {sorted(state)}")
        cost = state["cost"]
        return cls(np.asarray(state["boundaries"]), math.nan if cost is None else cost)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, IntervalClustering) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        shown = [f"{l}–{e - 1}" for l, e in zip(self.boundaries[:-1], self.boundaries[1:], strict=True)]
        if len(shown) > 12:
            shown[6:-6] = ["…"]
        cost = "" if math.isnan(self.cost) else f", cost={self.cost:.6g}"
        return f"IntervalClustering(k={self.k}, T={self.num_timesteps}{cost}: {' | '.join(shown)})"

    def __reduce__(self) -> tuple[type[IntervalClustering], tuple[np.ndarray, float]]:
        return IntervalClustering, (self.boundaries, self.cost)

    def _key(self) -> tuple[bytes, str]:
        return self.boundaries.tobytes(), self.cost.hex()  # hex: NaN equals NaN

    def _boundaries(self, device: torch.device) -> Tensor:
        """Boundaries on the device, int64 [K + 1]."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.boundaries.tolist()).to(device)
        return self._on_device[device]


def stratified_clusters(
    k: int,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator | None,
    rank: int | None = None,
    world_size: int | None = None,
    step: int = 0,
) -> Tensor:
    """The clusters of a stratified batch: ``batch_size // k`` of each, the rest on distinct random ones.

    With a rank they are of its own clusters alone.

    Returns:
        int64 [batch_size], sorted.

    Raises:
        ValueError: ``batch_size < 1``, or no such rank.
    """
    if rank is not None or world_size is not None:
        if rank is None or world_size is None:
            raise ValueError(
                f"rank, world_size: expected both or none, found rank={rank}, world_size={world_size}"
            )
        members = torch.tensor(clusters_of_rank(k, rank, world_size, step)).to(device)
        return members[stratified_clusters(len(members), batch_size, device, generator)]
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    each, extra = divmod(batch_size, k)
    cluster = torch.arange(k, device=device).repeat(each)
    if extra:
        order = torch.randint(_DRAW_RANGE, (k,), device=device, generator=generator).argsort()
        cluster = torch.cat([cluster, order[:extra]])
    return cluster.sort().values
