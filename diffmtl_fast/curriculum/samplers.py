"""Samplers without memory: ordinary, stratified, and any distribution of the noise level."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._host import upload
from ..clustering import IntervalClustering, NoiseClustering, NoiseDistribution
from ..clustering.distributions import DISTRIBUTIONS
from ..clustering.drawing import random_integers
from ._levels import Clustering, draw, ordinary_density
from .timestep_sampler import TimestepSampler, cumulative, draw_categories


class UniformSampler(TimestepSampler):
    """Ordinary training: timesteps drawn uniformly, or continuous levels from the clustering's distribution.

    Probability of a timestep 1 / T; density of a continuous level that of ``clusters.distribution``.

    Args:
        clusters: the tasks; see `TimestepSampler`.
        only: index of a cluster, to draw from that alone: what trains an expert of an interval.
        generator: source of randomness; see `TimestepSampler`.
        process_group: processes that train together; see `TimestepSampler`.

    Raises:
        TypeError: `clusters` is no clustering.
        ValueError: there is no such cluster.
    """

    def __init__(
        self,
        clusters: Clustering,
        *,
        only: int | None = None,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(clusters, generator=generator, process_group=process_group)
        if only is not None and not 0 <= only < clusters.k:
            raise ValueError(f"only: expected 0 <= only < k = {clusters.k}, found {only}")
        self.only = only

    def density(self, level: Tensor) -> Tensor:
        """1 / T, or the distribution's density, of the cluster's levels alone; see `TimestepSampler.density`."""
        density = ordinary_density(self.tasks, level)
        if self.only is None:
            return density
        share = float(np.diff(self.tasks.probabilities)[self.only])
        return torch.where(self.tasks.assign(level) == self.only, density / share, 0.0)

    def _draw(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(self.tasks, IntervalClustering) and self.only is None:
            # The very draws of the loop that everybody writes.
            return random_integers(self.tasks.num_timesteps, (batch_size,), device, generator)
        first = torch.full((batch_size,), self.only or 0, dtype=torch.int64, device=device)
        return draw(self.tasks, first, first + (self.tasks.k if self.only is None else 1), generator, dtype)


class StratifiedSampler(TimestepSampler):
    """Equally many levels from every cluster; within a cluster as in ordinary training.

    A level of cluster k has the density p(level) / (K P_k), where p is that of ordinary training and P_k its
    share of the cluster; for a timestep that is 1 / (K |cluster k|). ``clusters.sample`` with the interface
    of the samplers. Arguments as `TimestepSampler`.

    Source: Go et al., "Addressing Negative Transfer in Diffusion Models", NeurIPS 2023, arXiv 2306.00354.
    """

    def __init__(
        self,
        clusters: Clustering,
        *,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(clusters, generator=generator, process_group=process_group)
        shares = torch.from_numpy(np.diff(clusters.probabilities))
        self.register_buffer("_factors", 1.0 / (clusters.k * shares), persistent=False)
        self._factors: Tensor

    def density(self, level: Tensor) -> Tensor:
        """p(level) / (K P_k); see `TimestepSampler.density`."""
        density = ordinary_density(self.tasks, level)
        return density * upload(self._factors, level.device)[self.tasks.assign(level)].to(density.dtype)

    def _draw(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Tensor:
        options: dict[str, Any] = {"device": device, "generator": generator}
        if isinstance(self.tasks, NoiseClustering):
            options["dtype"] = dtype
        return self.tasks.sample(batch_size, **options)[0]


class DistributionSampler(TimestepSampler):
    """Levels from another distribution than the ordinary one: logit-normal, Beta, Laplace in the log-SNR, ….

    Continuous levels follow the distribution itself. Timesteps follow it cut into T cells: a distribution of
    times t in (0, 1) into equal ones, P(t) = F((t + 1) / T) − F(t / T), or, given the log-SNR of a schedule,
    any distribution into those around each timestep's log-SNR, bounded half way to its neighbours (and as far
    beyond the first and the last one), normalised to the part inside.

    The distribution changes what is learned; nothing makes up for it (`weight` is 1). Losses averaged by
    cluster feel it within the clusters only.

    Args:
        clusters: the tasks; see `TimestepSampler`.
        distribution: of ``dm.clustering``, such as ``LogitNormalTime(mean, std)`` (Esser et al., arXiv
            2403.03206), ``BetaTime(a, b)``, ``LaplaceTime(mean, scale)`` or ``LaplaceSigma(mean, scale)``
            (Hang et al., arXiv 2407.03297); of times for clusters of times, of σ for clusters of σ.
        log_snr: [T], finite and strictly monotone: timesteps are matched to the distribution by their
            log-SNR.
        generator: source of randomness; see `TimestepSampler`.
        process_group: processes that train together; see `TimestepSampler`.

    Attributes:
        distribution: the distribution.

    Raises:
        TypeError: `clusters` or `distribution` is none.
        ValueError: distribution, clusters and log-SNR do not fit together, or the distribution has no mass on
            the schedule.

    Example:
        ``DistributionSampler(clusters, LaplaceSigma(0.0, 0.5), log_snr=log_snr(scheduler))``
    """

    def __init__(
        self,
        clusters: Clustering,
        distribution: NoiseDistribution,
        *,
        log_snr: np.ndarray | Tensor | None = None,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(clusters, generator=generator, process_group=process_group)
        if not isinstance(distribution, tuple(DISTRIBUTIONS.values())):
            raise TypeError(
                f"distribution: expected one of {', '.join(kind.__name__ for kind in DISTRIBUTIONS.values())}, "
                f"found {distribution!r}"
            )
        self.distribution = distribution
        self._whole = NoiseClustering(distribution, np.array([0.0, 1.0]))
        probabilities = torch.empty(0, dtype=torch.float64)
        if isinstance(clusters, IntervalClustering):
            probabilities = _cell_probabilities(distribution, clusters.num_timesteps, log_snr)
        elif log_snr is not None:
            raise ValueError("log_snr: expected none for clusters of continuous levels")
        elif distribution.levels != clusters.distribution.levels:
            raise ValueError(
                f"distribution: expected one of {clusters.distribution.levels}, as the clusters are, found "
                f"{distribution}"
            )
        self.register_buffer("_probabilities", probabilities, persistent=False)
        self.register_buffer("_cumulative", cumulative(probabilities), persistent=False)
        self._probabilities: Tensor
        self._cumulative: Tensor

    def density(self, level: Tensor) -> Tensor:
        """P(t), or the distribution's density; see `TimestepSampler.density`."""
        if isinstance(self.tasks, NoiseClustering):
            return self.distribution.density(level)
        return upload(self._probabilities, level.device)[level]

    def _draw(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(self.tasks, NoiseClustering):
            first = torch.zeros(batch_size, dtype=torch.int64, device=device)
            return self._whole.draw(first, first + 1, generator=generator, dtype=dtype)
        return draw_categories(self._cumulative, batch_size, device, generator)


def _cell_probabilities(
    distribution: NoiseDistribution, num_timesteps: int, log_snr: np.ndarray | Tensor | None
) -> Tensor:
    """P(t), float64 [T]; see `DistributionSampler`."""
    if log_snr is None:
        if distribution.levels == "σ":
            raise ValueError(
                f"log_snr: expected that of the timesteps, [{num_timesteps}], for a distribution of "
                f"{distribution.levels}, found none"
            )
        edges = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    else:
        edges = distribution.at_log_snr(_log_snr_edges(log_snr, num_timesteps))
    mass = distribution.cdf(edges).diff().abs()
    total = mass.sum()
    if not total > 0:
        raise ValueError(
            f"distribution: expected mass on the schedule's log-SNR, found none of {distribution}"
        )
    return mass / total


def _log_snr_edges(log_snr: np.ndarray | Tensor, num_timesteps: int) -> Tensor:
    """Bounds of the timesteps in log-SNR, [T + 1]: half way between neighbours, as far beyond the ends."""
    values = torch.as_tensor(log_snr).detach().double().cpu()
    if values.shape != (num_timesteps,) or num_timesteps < 2:
        raise ValueError(
            f"log_snr: expected [T] with T = {num_timesteps} of at least 2, found {list(values.shape)}"
        )
    steps = values.diff()
    if not values.isfinite().all() or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError("log_snr: expected finite and strictly monotone values, found others")
    between = values[:-1] + steps / 2
    return torch.cat([values[:1] - steps[:1] / 2, between, values[-1:] + steps[-1:] / 2])
