"""What samplers have in common that draw one of several cells of levels, and then a level in it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._levels import Clustering, draw, equal_cells, ordinary_density
from .timestep_sampler import TimestepSampler, cumulative, draw_categories

_CONTINUOUS_CELLS = 100


class CellSampler(TimestepSampler):
    """Draws cell c with probability P(c), and in it as ordinary training does: q(level) = p(level) P(c) / p(c).

    Args:
        clusters: the tasks; see `TimestepSampler`.
        cells: number of cells of equal probability in ordinary training, at most T; None for one per timestep, and
            100 for continuous levels.
        generator: source of randomness; see `TimestepSampler`.
        process_group: processes that train together; see `TimestepSampler`.

    Raises:
        TypeError: `clusters` is no clustering.
        ValueError: the number of cells is out of range.
    """

    def __init__(
        self,
        clusters: Clustering,
        *,
        cells: int | None = None,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(clusters, generator=generator, process_group=process_group)
        most = getattr(clusters, "num_timesteps", None)
        number = cells if cells is not None else most or _CONTINUOUS_CELLS
        if number < 1 or (most is not None and number > most):
            raise ValueError(f"cells: expected 1 … {most or 'any number'}, found {cells}")
        self._cells = equal_cells(clusters, number)
        self.register_buffer(
            "_ordinary", torch.from_numpy(np.diff(self._cells.probabilities)), persistent=False
        )
        self._ordinary: Tensor  # p(c), [C]

    @property
    def probabilities(self) -> Tensor:
        """P(c), float64 [C]."""
        raise NotImplementedError(f"{type(self).__name__} must define probabilities")

    def density(self, level: Tensor) -> Tensor:
        """p(level) P(c) / p(c); see `TimestepSampler.density`."""
        density = ordinary_density(self.tasks, level)
        ratio = (self.probabilities / self._ordinary).to(level.device)
        return density * ratio[self._cells.assign(level)].to(density.dtype)

    def _draw(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Tensor:
        cell = draw_categories(cumulative(self.probabilities), batch_size, device, generator)
        return draw(self._cells, cell, cell + 1, generator, dtype)
