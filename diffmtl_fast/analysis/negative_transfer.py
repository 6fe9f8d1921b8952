"""The negative transfer gap: what experts of an interval of timesteps do better than the model of all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._progress import NoProgress, open_progress
from ..clustering import IntervalClustering
from .frechet import FrechetDistance

Array: TypeAlias = "NDArray[np.float64]"
#: Draws the same number of samples from the same noise with any denoiser.
Sample: TypeAlias = Callable[[nn.Module], Any]
#: Samples to features [N, D].
Features: TypeAlias = Callable[[Any], Array]


class SwitchedModel(nn.Module):
    """A denoiser that leaves an interval of timesteps to another one.

    Called as ``model(x, t, ...)`` with timesteps t, a number or [B], and what else both models take. Where a batch
    has timesteps inside and outside, both run on all of it, and every sample keeps the output of its own.

    Args:
        outside: the denoiser of the other timesteps; its parameters come first.
        inside: the denoiser of the interval.
        first: the interval's first timestep, or least time that the models are called with.
        end: one past its last one.
    """

    def __init__(self, outside: nn.Module, inside: nn.Module, first: float, end: float) -> None:
        super().__init__()
        self.outside, self.inside, self.first, self.end = outside, inside, first, end

    def forward(self, x: Tensor, t: Tensor | int | float, *args: Any, **kwargs: Any) -> Any:
        """Denoise; the result is that of the model in charge, or a tensor for a batch of both."""
        t = torch.as_tensor(t, device=x.device)
        within = (t >= self.first) & (t < self.end)
        if bool(within.all()):
            return self.inside(x, t, *args, **kwargs)
        if not bool(within.any()):
            return self.outside(x, t, *args, **kwargs)
        inner, outer = (_tensor(model(x, t, *args, **kwargs)) for model in (self.inside, self.outside))
        return torch.where(within.view(-1, *[1] * (outer.dim() - 1)), inner, outer)


@dataclass(frozen=True)
class NegativeTransfer:
    """The gap of every interval.

    Attributes:
        intervals: K intervals of timesteps.
        multitask: Fréchet distance of the multi-task model's samples.
        switched: float64 [K], with the expert inside the interval.
        low: float64 [K], lower end of the confidence interval of `gaps`.
        high: float64 [K], upper end.
        confidence: of that interval.
    """

    intervals: IntervalClustering
    multitask: float
    switched: Array
    low: Array
    high: Array
    confidence: float

    @property
    def gaps(self) -> Array:
        """NTG [K], switched − multitask: below 0 the expert is better, the other tasks' training does harm."""
        return self.switched - self.multitask


def negative_transfer(
    multitask: nn.Module,
    expert: Callable[[int], nn.Module],
    intervals: IntervalClustering,
    sample: Sample,
    features: Features,
    real: Array,
    *,
    times: Array | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> NegativeTransfer:
    """Measure the negative transfer gap of every interval.

    NTG of an interval = Fréchet distance of samples that an expert of the interval denoises inside it and the
    multi-task model elsewhere, minus that of the multi-task model's own samples. NTG < 0 is negative transfer.
    Source: Go et al., "Addressing Negative Transfer in Diffusion Models", NeurIPS 2023, arXiv 2306.00354.

    The confidence interval tells how much the gap varies with the samples drawn: a basic bootstrap over the noise
    that they start from, which all models share, so that most of their common variation cancels. It does not tell
    how much the gap varies with the training of the models.

    Args:
        multitask: the denoiser of all timesteps, called as ``multitask(x, t, ...)``.
        expert: the index of an interval to the denoiser that was trained on it alone. Called once for each, in
            order; it may train it then.
        intervals: K intervals of timesteps.
        sample: draws N samples with a denoiser, from the same noise each time, so that sample i of two denoisers
            differ by the denoiser alone.
        features: samples to features [N, D].
        real: float64 [M, D], the features of real data.
        times: [K + 1], the intervals' bounds in what the denoisers are called with, where that is not the
            timestep.
        resamples: bootstrap resamples.
        confidence: of the intervals, between 0 and 1.
        seed: of the bootstrap.
        progress: show progress on standard output.

    Returns:
        Distances, gaps and their confidence intervals.

    Raises:
        ValueError: an argument is out of range, or a denoiser drew another number of samples.
    """
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, found {resamples}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number between 0 and 1, found {confidence}")
    distance = FrechetDistance(np.asarray(real, dtype=np.float64))
    report = open_progress(intervals.k, unit="experts") if progress else NoProgress()
    with closing(report):
        drawn = [np.asarray(features(sample(multitask)), dtype=np.float64)]
        for j in range(intervals.k):
            first, end = intervals.boundaries[j : j + 2].tolist()
            low, high = (intervals.boundaries if times is None else times)[j : j + 2].tolist()
            switched = SwitchedModel(multitask, expert(j), low, high)
            drawn.append(np.asarray(features(sample(switched)), dtype=np.float64))
            report.update(j + 1, f"timesteps {first} to {end - 1}")
    shapes = {found.shape for found in drawn}
    if len(shapes) > 1:
        raise ValueError(f"sample: expected the same number of samples from all models, found {shapes}")
    found = np.array([distance(each) for each in drawn])
    low, high = _bootstrap(distance, drawn, found[1:] - found[0], resamples, confidence, seed)
    return NegativeTransfer(intervals, float(found[0]), found[1:], low, high, confidence)


def _bootstrap(
    distance: FrechetDistance, drawn: list[Array], gaps: Array, resamples: int, confidence: float, seed: int
) -> tuple[Array, Array]:
    """Basic bootstrap intervals: 2 gap − quantiles of the resampled gaps, which also takes out their bias.

    The Fréchet distance of few samples is too large, of a resample of them once more so.
    """
    rng = np.random.default_rng(seed)
    found = np.empty((resamples, len(gaps)))
    for row in found:
        index = rng.integers(len(drawn[0]), size=len(drawn[0]))
        multitask = distance(drawn[0][index])
        row[:] = [distance(each[index]) - multitask for each in drawn[1:]]
    tail = (1.0 - confidence) / 2
    upper, lower = np.quantile(found, (1.0 - tail, tail), axis=0)
    return 2 * gaps - upper, 2 * gaps - lower


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample
