"""Timesteps from a range that is scheduled by the step of training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._levels import Clustering, boundary_indices, cut, draw, ordinary_density, probability_below
from .timestep_sampler import TimestepSampler


class RangeSampler(TimestepSampler):
    """Draws as ordinary training does, from one range of levels after the other.

    ``[(0, 500, 1000), (2000, 0, 1000)]`` trains on timesteps 500 … 999 for 2000 steps, and then on all. Steps are
    the calls of `update`; levels are drawn on the host all the same, as no loss decides. A single range is what
    training scripts call min_timestep and max_timestep.

    Args:
        clusters: the tasks; see `TimestepSampler`.
        ranges: (step, first, end) with steps that begin at 0 and rise: from that step on levels in [first, end)
            are drawn, timesteps or continuous levels.
        min_timestep: first of a single range; in place of `ranges`.
        max_timestep: end of a single range, T by default; in place of `ranges`.
        generator: source of randomness; see `TimestepSampler`.
        process_group: processes that train together; see `TimestepSampler`.

    Attributes:
        steps: calls of `update` so far.

    Raises:
        TypeError: `clusters` is no clustering.
        ValueError: a range is empty or beyond the levels, or the steps do not begin at 0 and rise.
    """

    def __init__(
        self,
        clusters: Clustering,
        ranges: Sequence[tuple[int, float, float]] | None = None,
        *,
        min_timestep: float | None = None,
        max_timestep: float | None = None,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(clusters, generator=generator, process_group=process_group)
        single = min_timestep is not None or max_timestep is not None
        if single == (ranges is not None):
            raise ValueError("expected either ranges, or min_timestep or max_timestep")
        if ranges is None:
            end = getattr(clusters, "num_timesteps", np.inf) if max_timestep is None else max_timestep
            ranges = [(0, 0 if min_timestep is None else min_timestep, end)]
        if any(len(entry) != 3 for entry in ranges):
            raise ValueError(f"ranges: expected (step, first, end), found {[*ranges]}")
        self.starts = [int(step) for step, _, _ in ranges]
        if self.starts[:1] != [0] or any(a >= b for a, b in itertools.pairwise(self.starts)):
            raise ValueError(f"ranges: expected steps that begin at 0 and rise, found {self.starts}")
        ends = np.array([[probability_below(clusters, level) for level in entry[1:]] for entry in ranges])
        if not ((ends[:, 0] < ends[:, 1]) & (ends >= 0).all(1) & (ends <= 1).all(1)).all():
            raise ValueError(f"ranges: expected levels first < end within {clusters!r}, found {[*ranges]}")
        self.ranges = [(int(step), first, end) for step, first, end in ranges]
        self._grid = cut(clusters, np.unique(np.append(ends, [0.0, 1.0])))
        self._bounds = [boundary_indices(self._grid, row) for row in ends]
        self._shares = [end - first for first, end in ends.tolist()]
        # On the host, so that asking for it never waits for a device.
        self.steps = 0

    @property
    def follows_losses(self) -> bool:
        """False: it counts the steps alone."""
        return False

    @property
    def phase(self) -> int:
        """Index of the range in force."""
        return int(np.searchsorted(self.starts, self.steps, side="right")) - 1

    def update(self, loss: Tensor, level: Tensor | None = None) -> None:
        """Count an optimizer step."""
        self.steps += 1

    def density(self, level: Tensor) -> Tensor:
        """That of ordinary training, restricted to the range in force; see `TimestepSampler.density`."""
        density, (first, end) = ordinary_density(self.tasks, level), self._bounds[self.phase]
        cell = self._grid.assign(level)
        return torch.where((cell >= first) & (cell < end), density / self._shares[self.phase], 0.0)

    def _draw(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Tensor:
        first, end = (
            torch.full((batch_size,), bound, dtype=torch.int64, device=device)
            for bound in self._bounds[self.phase]
        )
        return draw(self._grid, first, end, generator, dtype)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the steps so far and the generator's state for `state_dict`."""
        return {**super().get_extra_state(), "steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the steps so far and the generator's state from `state_dict`."""
        super().set_extra_state(state)
        self.steps = int(state["steps"])

    def extra_repr(self) -> str:
        """Show the ranges."""
        return f"{super().extra_repr()}, ranges={self.ranges}"
