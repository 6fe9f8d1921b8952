"""The curriculum: noise levels that are easy to denoise first, harder ones as training gets stuck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from .._host import upload
from ..clustering import NoiseClustering
from ..clustering.drawing import random_integers
from ._levels import (
    Clustering,
    boundary_indices,
    check_clustering,
    check_same_levels,
    draw,
    merge,
    ordinary_density,
)
from .timestep_sampler import TimestepSampler

Order: TypeAlias = Literal["easy_to_hard", "hard_to_easy"]
Sampling: TypeAlias = Literal["union", "clusters", "tasks"]
Noisiest: TypeAlias = Literal["last", "first"]

_KEY_RANGE = 2**62
_NO_LIMIT = 2**62  # iterations


class DifficultyCurriculum(TimestepSampler):
    """Trains on the noisiest cluster first and adds the next less noisy one whenever the loss stops
    improving.

    Denoising is easiest at high noise. With clusters C_1 … C_N, C_N the noisiest, phase n trains on C_{N−n+1}
    ∪ … ∪ C_N. A phase ends when the loss has not fallen below its best value for ``patience`` consecutive
    iterations, or after ``max_length`` iterations; the best loss and both counts then start anew. After phase
    N training is ordinary, and ``phase`` is N + 1.

    Source: Kim et al., "Denoising Task Difficulty-based Curriculum for Training Diffusion Models", ICLR 2025,
    arXiv 2403.10348, with N = 20 log-SNR clusters. Its defaults are those here; smoothing, least improvement,
    limited and fixed length, and sampling by clusters or tasks are ours.

    The clusters of the curriculum need not be the tasks that a weighting balances: with ``tasks=`` `sample`
    returns the index in that clustering, while the phases follow `clusters`. Tasks outside the phase are
    absent from the batch, which every weighting takes into account.

    Where the losses are on a GPU, `update` and `sample` do not wait for it; reading `phase` does.

    Args:
        clusters: C_1 … C_N, for example ``cluster_snr(log_snr, k=20)``, or a clustering of continuous levels.
            Steep ends of a schedule make clusters of single timesteps; ``min_size`` there prevents it.
        patience: iterations without improvement that end a phase; None for phases of fixed length.
        max_length: most iterations of a phase, one number or one for each of the N phases. With
            ``patience=None`` this is the length of the phases.
        smoothing: β in [0, 1) of the moving average β · average + (1 − β) · loss that is compared instead of
            the loss; it starts anew with each phase. 0 compares the loss itself.
        min_delta: the loss improves only if it falls by more than this below its best value.
        order: ``"hard_to_easy"`` is the anti-curriculum, phase n trains on C_1 ∪ … ∪ C_n.
        sampling: ``"union"``: as in ordinary training, restricted to the phase's levels. ``"clusters"``:
            equally many levels from each cluster of the phase, and after phase N as in ordinary training.
            ``"tasks"``: equally many from each task, as far as it lies in the phase, and from all of them
            after phase N, which is the ordinary training of multi-task methods.
        tasks: the clustering whose index `sample` returns, of the same levels; default `clusters`.
        noisiest: which of the clusters is the noisiest. By default the last; the first where `clusters` are of a
            distribution with ``data_at=1``. Say ``"first"`` for timesteps in the order of decreasing noise.
        generator: source of randomness; see `TimestepSampler`.
        process_group: processes that train together; see `TimestepSampler`.

    Attributes:
        clusters: C_1 … C_N.
        tasks: the clustering whose index `sample` returns.
        current_phase, age, stale: buffers, int64 []; the phase, its iterations so far, and those since the
            last improvement.
        best, smoothed: buffers, float64 []; the phase's best value, and its moving average (NaN before the
            first).

    Raises:
        TypeError: `clusters` or `tasks` is no clustering.
        ValueError: an argument is out of range, or clusters and tasks are of different levels.

    Example:
        ``DifficultyCurriculum(cluster_snr(log_snr, k=20), tasks=cluster_snr(log_snr, k=5))``
    """

    current_phase: Tensor
    age: Tensor
    stale: Tensor
    best: Tensor
    smoothed: Tensor

    def __init__(
        self,
        clusters: Clustering,
        patience: int | None = 200,
        *,
        max_length: int | Sequence[int] | None = None,
        smoothing: float = 0.0,
        min_delta: float = 0.0,
        order: Order = "easy_to_hard",
        sampling: Sampling = "union",
        tasks: Clustering | None = None,
        noisiest: Noisiest | None = None,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        tasks = clusters if tasks is None else tasks
        check_clustering("clusters", clusters)
        check_clustering("tasks", tasks)
        super().__init__(tasks, generator=generator, process_group=process_group)
        check_same_levels(clusters, tasks)
        noisiest = _noisiest(clusters) if noisiest is None else noisiest
        _check_pacing(clusters.k, patience, max_length, smoothing, min_delta)
        for name, value, choices in (
            ("order", order, Order),
            ("sampling", sampling, Sampling),
            ("noisiest", noisiest, Noisiest),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, found {value!r}")
        self.clusters = clusters
        self.patience = patience
        self.max_length = max_length
        self.smoothing = smoothing
        self.min_delta = min_delta
        self.order = order
        self.sampling = sampling
        self.register_buffer("current_phase", torch.tensor(1))
        self.register_buffer("age", torch.tensor(0))
        self.register_buffer("stale", torch.tensor(0))
        self.register_buffer("best", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("smoothed", torch.tensor(torch.nan, dtype=torch.float64))
        self._grid = merge(clusters, tasks)
        strata = _strata(
            self._grid, clusters, tasks, sampling, (order == "easy_to_hard") == (noisiest == "last")
        )
        self.register_buffer("_strata", torch.from_numpy(strata), persistent=False)
        limits = torch.as_tensor(_NO_LIMIT if max_length is None else max_length, dtype=torch.int64)
        limits = torch.cat([limits.expand(clusters.k), torch.tensor([_NO_LIMIT])])
        self.register_buffer("_limits", limits, persistent=False)
        self._strata: Tensor
        self._limits: Tensor

    @property
    def phase(self) -> int:
        """The phase of the next iteration, 1 … N, or N + 1 once training is ordinary; waits for a GPU."""
        return int(self.current_phase)

    @property
    def finished(self) -> bool:
        """Whether training is ordinary; waits for a GPU."""
        return self.phase > self.clusters.k

    @torch.no_grad()
    def update(self, loss: Tensor | float, level: Tensor | None = None) -> None:
        """Count an iteration.

        Args:
            loss: of the iteration: a scalar, or the losses of the samples, which are averaged. One that is
                not finite counts as no improvement and stays out of the moving average. Call it once per
                optimizer step. Processes that train together pass their own if they have a process group, whose
                losses are averaged as those of one batch, and else the same one, to be in the same phase.
            level: not needed.

        Raises:
            TypeError: the loss is no number and no floating-point tensor.
        """
        if isinstance(loss, Tensor) and not loss.is_floating_point():
            raise TypeError(f"loss: expected a floating-point tensor, found {loss.dtype}")
        value = torch.as_tensor(loss, dtype=torch.float64, device=self.best.device)
        value = self.gather(value.flatten())[0].mean()
        finite = value.isfinite()
        if self.smoothing > 0:
            average = torch.where(
                self.smoothed.isnan(), value, self.smoothed.lerp(value, 1.0 - self.smoothing)
            )
            value = torch.where(finite, average, self.smoothed)
        better = finite & (value < self.best - self.min_delta)
        best = torch.where(better, value, self.best)
        stale = torch.where(better, 0, self.stale + 1)
        age = self.age + 1
        over = age >= self._limits.index_select(0, self.current_phase.view(1) - 1)[0]
        if self.patience is not None:
            over |= stale >= self.patience
        over &= self.current_phase <= self.clusters.k  # ordinary training has no end
        self.current_phase.add_(over)
        self.age.copy_(age.masked_fill(over, 0))
        self.stale.copy_(stale.masked_fill(over, 0))
        self.best.copy_(best.masked_fill(over, torch.inf))
        if self.smoothing > 0:
            self.smoothed.copy_(value.masked_fill(over, torch.nan))

    def density(self, level: Tensor) -> Tensor:
        """That of ordinary training, restricted to the phase; see `TimestepSampler.density`."""
        density = ordinary_density(self._grid, level)
        strata = self._phase_strata()
        ends = upload(torch.from_numpy(self._grid.probabilities.copy()), strata.device)[strata]
        active = strata[:, 1] > strata[:, 0]
        shares = torch.where(active, ends[:, 1] - ends[:, 0], 1.0)
        cell = self._grid.assign(level).to(strata.device)[..., None]
        inside = (cell >= strata[:, 0]) & (cell < strata[:, 1])
        factor = (inside / shares).sum(-1) / active.sum()  # every stratum is as likely as any other
        return density * factor.to(density)

    def _draw(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Tensor:
        strata = self._phase_strata()
        index = torch.arange(batch_size, device=device)
        if len(strata) == 1:
            stratum = torch.zeros_like(index)
        else:
            # The phase's strata in random order, over and over: none gets two levels more than another.
            active = strata[:, 1] > strata[:, 0]
            keys = random_integers(_KEY_RANGE, (len(strata),), device, generator)
            order = keys.masked_fill(~active, _KEY_RANGE).argsort()
            stratum = order[index % active.sum()]
        return draw(self._grid, strata[stratum, 0], strata[stratum, 1], generator, dtype)

    def _phase_strata(self) -> Tensor:
        """Intervals of the grid that the phase draws from, as boundaries, int64 [S, 2]; some are empty."""
        return self._strata.index_select(0, self.current_phase.view(1) - 1)[0]

    def get_extra_state(self) -> dict[str, Any]:
        """Return the clusters and the generator's state for `state_dict`."""
        return {**super().get_extra_state(), "boundaries": self.clusters.probabilities.tolist()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the generator's state from `state_dict`.

        Raises:
            ValueError: the state is that of a curriculum over other clusters, or only one of them has a
                generator.
        """
        if state["boundaries"] != self.clusters.probabilities.tolist():
            raise ValueError(
                f"DifficultyCurriculum: expected the state of one over {self.clusters!r}, found one over "
                f"{len(state['boundaries']) - 1} clusters with other boundaries"
            )
        super().set_extra_state(state)

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"clusters={self.clusters!r}, patience={self.patience}, max_length={self.max_length}, "
            f"smoothing={self.smoothing}, min_delta={self.min_delta}, order={self.order!r}, "
            f"sampling={self.sampling!r}"
        )


def _noisiest(clusters: Clustering) -> Noisiest:
    """Tell which cluster is the noisiest, as far as the levels say it."""
    if isinstance(clusters, NoiseClustering):
        low, high = clusters.distribution.log_snr(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
        return "last" if low > high else "first"
    return "last"


def _strata(
    grid: Clustering, clusters: Clustering, tasks: Clustering, sampling: Sampling, last_first: bool
) -> np.ndarray:
    """Intervals that each phase draws from equally often, as boundaries of the grid.

    Returns:
        int64 [N + 1, S, 2]; where both boundaries are equal the phase has one interval less.
    """
    edges, n = np.array(boundary_indices(grid, clusters.probabilities)), clusters.k
    phases = [(edges[n - i], edges[n]) if last_first else (edges[0], edges[i]) for i in range(1, n + 1)]
    whole = np.array([[edges[0], edges[n]]])
    if sampling == "union":
        return np.array([*([phase] for phase in phases), whole])
    parts = edges if sampling == "clusters" else np.array(boundary_indices(grid, tasks.probabilities))
    intervals = np.stack([parts[:-1], parts[1:]], axis=1)
    rows = [np.clip(intervals, *phase) for phase in phases]
    if sampling == "tasks":
        return np.array([*rows, intervals])
    ordinary = np.zeros_like(intervals)
    ordinary[0] = whole
    return np.array([*rows, ordinary])


def _check_pacing(
    phases: int,
    patience: int | None,
    max_length: int | Sequence[int] | None,
    smoothing: float,
    min_delta: float,
) -> None:
    if patience is None and max_length is None:
        raise ValueError("expected patience or max_length, found neither: no phase would end")
    if patience is not None and not (isinstance(patience, int) and patience >= 1):
        raise ValueError(f"patience: expected an integer of at least 1, found {patience}")
    if max_length is not None:
        lengths = np.asarray(max_length)
        if lengths.dtype.kind not in "iu" or lengths.shape not in ((), (phases,)) or (lengths < 1).any():
            raise ValueError(
                f"max_length: expected an integer of at least 1, or {phases} for as many phases, "
                f"found {max_length}"
            )
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected at least 0 and below 1, found {smoothing}")
    if not 0 <= min_delta < float("inf"):
        raise ValueError(f"min_delta: expected a number of at least 0, found {min_delta}")
