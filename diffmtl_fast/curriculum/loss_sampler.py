"""Timesteps drawn as often as their observed losses are large."""

from __future__ import annotations

import torch
from torch import Tensor

from ._cells import CellSampler
from ._levels import Clustering
from .timestep_sampler import check_sample_losses


class LossSampler(CellSampler):
    """Draws a level as often as the losses observed there are large, so that training dwells on them.

    The levels are cut into C cells of equal probability in ordinary training. With the moving average l_c of the
    mean losses of cell c, and that of the others where none was seen, it has the probability

        P(c) = (1 − ε) p(c) l_c^power / Σ p l^power + ε p(c),   ε = uniform_share, p ordinary training,

    and within a cell levels are drawn as in ordinary training. A loss that is not finite is left out. The
    distribution changes what is learned; nothing makes up for it (`weight` is 1). Ours, after training scripts
    that draw by the losses; `LossSecondMomentSampler` does so too, and makes up for it.

    Args:
        clusters: the tasks; see `TimestepSampler`.
        cells: number of cells C, at most T; default T, and 100 for continuous levels.
        decay: weight of the past in the moving averages, per update that sees the cell, 0 up to 1.
        power: of the loss; 0 is ordinary training, a negative power favours small losses.
        uniform_share: ε, above 0 and at most 1.
        generator: source of randomness; see `TimestepSampler`.
        process_group: processes that train together; see `TimestepSampler`.

    Attributes:
        averages: buffer, float64 [C]; NaN for a cell that no loss was seen of.

    Raises:
        TypeError: `clusters` is no clustering.
        ValueError: an argument is out of range.
    """

    averages: Tensor

    def __init__(
        self,
        clusters: Clustering,
        *,
        cells: int | None = None,
        decay: float = 0.9,
        power: float = 1.0,
        uniform_share: float = 0.1,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(clusters, cells=cells, generator=generator, process_group=process_group)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected at least 0 and below 1, found {decay}")
        if not -10 <= power <= 10:
            raise ValueError(f"power: expected -10 to 10, found {power}")
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share: expected above 0 and at most 1, found {uniform_share}")
        self.decay = decay
        self.power = power
        self.uniform_share = uniform_share
        self.register_buffer("averages", torch.full((len(self._ordinary),), torch.nan, dtype=torch.float64))

    @property
    def probabilities(self) -> Tensor:
        """P(c), float64 [C]."""
        losses = torch.where(self.averages.isnan(), self.averages.nanmean(), self.averages)
        # Relative to the largest, so that no power of them overflows; a loss of 0 may not get an infinite share.
        relative = (losses / losses.amax()).clamp(min=1e-12)
        shares = self._ordinary * relative**self.power
        shares = torch.where(
            relative.isnan().any(), self._ordinary, shares
        )  # no loss was seen, or all were 0
        return (1.0 - self.uniform_share) * shares / shares.sum() + self.uniform_share * self._ordinary

    @torch.no_grad()
    def update(self, loss: Tensor, level: Tensor | None = None) -> None:
        """Take in the losses [B], at least 0, of the levels [B]; see `TimestepSampler.update`."""
        check_sample_losses(loss, level)
        loss, level = self.gather(loss, level)
        assert level is not None
        value = loss.to(self.averages)
        finite = value.isfinite()
        cells = torch.arange(len(self.averages), device=value.device)
        inside = (self._cells.assign(level).to(value.device).unsqueeze(1) == cells) & finite.unsqueeze(1)
        number = inside.sum(0)
        mean = torch.where(inside, value.unsqueeze(1), 0).sum(0) / number
        moved = torch.where(self.averages.isnan(), mean, mean.lerp(self.averages, self.decay))
        self.averages.copy_(torch.where(number > 0, moved, self.averages))
