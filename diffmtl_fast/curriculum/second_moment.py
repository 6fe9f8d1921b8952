"""Importance sampling of the timesteps by the second moment of their losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cells import CellSampler
from ._levels import Clustering, overlaps
from .timestep_sampler import check_sample_losses


class LossSecondMomentSampler(CellSampler):
    """Draws a level as often as the root of its mean squared loss is large, and weighs its loss down by as
    much.

    The levels are cut into cells of equal probability in ordinary training, one per timestep by default. With
    the last ``history`` losses of each, cell c has the probability

        P(c) = (1 − ε) r_c / Σ r + ε / C,   r_c = sqrt(mean of the squared losses),   ε = uniform_share,

    and within a cell levels are drawn as in ordinary training, whose density is p: q(level) = p(level) P(c) /
    p(c). Until every cell has its full history, levels are drawn as in ordinary training. A loss that is not
    finite is left out.

    `weight` makes up for it, so that the gradient expects what it would in ordinary training: the mean loss
    of task k over levels drawn from q needs the factor (q(task k) / p(task k)) p(level) / q(level). With a
    single task that is the published p(level) / q(level).

    Source: Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, arXiv
    2102.09672, with its defaults. Deviation: cells and tasks; the published one has a cell per timestep and a
    single task.

    Args:
        clusters: the tasks; see `TimestepSampler`.
        cells: number of cells C, at most T; default T, and 100 for continuous levels.
        history: losses remembered per cell.
        uniform_share: ε, above 0 and at most 1.
        generator: source of randomness; see `TimestepSampler`.
        process_group: processes that train together; see `TimestepSampler`.

    Attributes:
        losses: buffer, float64 [C, history]; the last losses of each cell, in a ring.
        counts: buffer, int64 [C]; losses seen so far.

    Raises:
        TypeError: `clusters` is no clustering.
        ValueError: an argument is out of range.
    """

    losses: Tensor
    counts: Tensor

    def __init__(
        self,
        clusters: Clustering,
        *,
        cells: int | None = None,
        history: int = 10,
        uniform_share: float = 0.001,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(clusters, cells=cells, generator=generator, process_group=process_group)
        if history < 1:
            raise ValueError(f"history: expected at least 1, found {history}")
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share: expected above 0 and at most 1, found {uniform_share}")
        self.history = history
        self.uniform_share = uniform_share
        number = len(self._ordinary)
        together = torch.from_numpy(overlaps(clusters, self._cells))  # [K, C]
        self.register_buffer("losses", torch.zeros(number, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(number, dtype=torch.int64))
        self.register_buffer("_cells_of_task", together / together.sum(1, keepdim=True), persistent=False)
        self._cells_of_task: Tensor

    @property
    def probabilities(self) -> Tensor:
        """P(c), float64 [C]."""
        roots = self.losses.square().mean(1).sqrt()
        learned = (1.0 - self.uniform_share) * roots / roots.sum() + self.uniform_share / len(roots)
        usable = (self.counts >= self.history).all() & (roots.sum() > 0)
        return torch.where(usable, learned, self._ordinary)

    def weight(self, level: Tensor) -> Tensor:
        """(q(task) / p(task)) p(level) / q(level), before the next `update`; see the class."""
        ratio = self.probabilities / self._ordinary  # q / p
        task = (self._cells_of_task @ ratio).to(level.device)
        return (task[self.tasks.assign(level)] / ratio.to(level.device)[self._cells.assign(level)]).float()

    @torch.no_grad()
    def update(self, loss: Tensor, level: Tensor | None = None) -> None:
        """Remember the losses [B] of the levels [B], in their order; see `TimestepSampler.update`."""
        check_sample_losses(loss, level)
        loss, level = self.gather(loss, level)
        assert level is not None
        value = loss.to(self.losses)
        finite = value.isfinite()
        # Cell C takes what is left out, so that no shape depends on the values.
        number = len(self.counts)
        cell = torch.where(finite, self._cells.assign(level).to(value.device), number)
        cell, order = cell.sort(stable=True)
        starts = torch.searchsorted(cell, torch.arange(number + 2, device=cell.device))
        seen = starts.diff()
        rank = torch.arange(len(cell), device=cell.device) - starts[cell]
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        # More losses of a cell than its history holds: the last ones stay.
        kept = (cell < number) & (rank >= seen[cell] - self.history)
        slot = cell * self.history + (counts[cell] + rank) % self.history
        spare = number * self.history
        ring = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        ring[torch.where(kept, slot, spare)] = value[order]
        self.losses.copy_(ring[:spare].view_as(self.losses))
        self.counts.add_(seen[:number])
