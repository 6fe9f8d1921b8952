"""SpeeD's distribution of timesteps: few where the noise level hardly changes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..clustering import IntervalClustering
from ._cells import CellSampler


class SpeeDSampler(CellSampler):
    """Draws the timesteps at which the noise level has almost stopped to change less often than the others.

    With σ_t = √(1 − ᾱ_t), a timestep at which σ rises by less than `least_change` per unit of t / T is
    `suppression` times less likely than the others: at the noisy end of most schedules, where tasks are alike and
    easy. The distribution changes what is learned; nothing makes up for it (`weight` is 1).

    Source: Wang et al., "A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model Training"
    (SpeeD), arXiv 2405.17403, with the constants of its public code (a change below 1e-4 per timestep at T =
    1000). Deviations: timesteps are drawn one by one, not in pairs on both sides of the threshold; the
    change-aware weight of the loss, the other half of SpeeD, is left to loss weights.

    Args:
        clusters: the tasks, of timesteps; see `TimestepSampler`.
        log_snr: [T], of the noise schedule.
        suppression: k, by which factor less often, at least 1.
        least_change: of σ, per unit of t / T.
        generator: source of randomness; see `TimestepSampler`.
        process_group: processes that train together; see `TimestepSampler`.

    Raises:
        TypeError: `clusters` is no clustering of timesteps.
        ValueError: `log_snr` is not [T] with T of at least 2, or an argument is out of range.
    """

    def __init__(
        self,
        clusters: IntervalClustering,
        log_snr: np.ndarray | Tensor,
        *,
        suppression: float = 5.0,
        least_change: float = 0.1,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(clusters, IntervalClustering):
            raise TypeError(f"clusters: expected an IntervalClustering, found {type(clusters).__name__}")
        super().__init__(clusters, generator=generator, process_group=process_group)
        if not (1 <= suppression < math.inf and 0 < least_change < math.inf):
            raise ValueError(
                "expected suppression of at least 1 and least_change above 0, found "
                f"{suppression} and {least_change}"
            )
        levels = torch.as_tensor(log_snr).detach().double().cpu()
        number = clusters.num_timesteps
        if levels.shape != (number,) or number < 2:
            raise ValueError(
                f"log_snr: expected [T] with T = {number} of at least 2, found {list(levels.shape)}"
            )
        change = torch.gradient(torch.sigmoid(-levels).sqrt())[0] * number
        likely = torch.where(change.abs() < least_change, 1.0 / suppression, 1.0).double()
        self.register_buffer("_probabilities", likely / likely.sum(), persistent=False)
        self._probabilities: Tensor

    @property
    def probabilities(self) -> Tensor:
        """P(t), float64 [T]."""
        return self._probabilities
