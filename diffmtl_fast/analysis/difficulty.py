"""Task difficulty: how fast the denoising tasks are learned, and how far apart their distributions lie.

Both ways of Kim et al., "Denoising Task Difficulty-based Curriculum for Training Diffusion Models" (ICLR 2025,
arXiv 2403.10348). How the paper estimates the relative entropy is not known to us; both estimates here are closed
forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._figures import smooth
from ..clustering import IntervalClustering

Array: TypeAlias = "NDArray[np.float64]"
Process: TypeAlias = Literal["vp", "ve", "flow"]


@dataclass(frozen=True)
class Convergence:
    """How fast models that each train on one interval of timesteps converge.

    Attributes:
        intervals: the timesteps of each of the K models.
        steps: float64 [N], optimizer steps.
        losses: float64 [K, N], smoothed.
        remaining: float64 [K, N], the part of the loss's fall that is yet to come: 1 at the first step, 0 at the
            level of the end.
        fraction: of the fall, for `steps_to`.
        steps_to: float64 [K], steps until that fraction of the fall is done; NaN where the loss did not fall.
    """

    intervals: IntervalClustering
    steps: Array
    losses: Array
    remaining: Array
    fraction: float
    steps_to: Array


def convergence(
    intervals: IntervalClustering,
    steps: NDArray[Any],
    losses: NDArray[Any],
    *,
    fraction: float = 0.9,
    reach: int | None = None,
) -> Convergence:
    """Compare the loss curves of the intervals' own models.

    Every curve is smoothed, and its fall from the first step to the level of the end (the mean over the last tenth
    of the steps) counted as 1, which makes intervals of different losses comparable. The steps to a fraction are
    those of the first crossing, interpolated.

    Args:
        intervals: K intervals of timesteps.
        steps: [N] optimizer steps, increasing.
        losses: [K, N] training losses of every interval's model at those steps.
        fraction: between 0 and 1.
        reach: neighbours on either side that a point is averaged with; default a hundredth of the points.

    Returns:
        The curves and the steps to the fraction.

    Raises:
        ValueError: shapes or values are not as stated.
    """
    steps, losses = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if steps.ndim != 1 or len(steps) < 2 or (np.diff(steps) <= 0).any():
        raise ValueError("steps: expected at least two increasing numbers [N], found others")
    if losses.shape != (intervals.k, len(steps)) or not np.isfinite(losses).all():
        raise ValueError(
            f"losses: expected finite numbers [{intervals.k}, {len(steps)}], found shape {list(losses.shape)}"
        )
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction: expected a number between 0 and 1, found {fraction}")
    smoothed = smooth(losses.T, len(steps) // 100 if reach is None else reach).T
    end = losses[:, -max(1, len(steps) // 10) :].mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        remaining = (smoothed - end) / (smoothed[:, :1] - end)
    falls = smoothed[:, :1] > end
    remaining = np.where(falls, remaining, np.nan)
    crossings = np.array([_first_crossing(steps, curve, 1.0 - fraction) for curve in remaining])
    return Convergence(intervals, steps, smoothed, remaining, fraction, crossings)


def _first_crossing(steps: Array, curve: Array, level: float) -> float:
    """Where a curve first comes down to a level, between two of its points; NaN if it does not."""
    below = np.flatnonzero(curve <= level)
    if not below.size:
        return float("nan")
    after = below[0]
    if after == 0:
        return float(steps[0])
    before = after - 1
    part = (curve[before] - level) / (curve[before] - curve[after])
    return float(steps[before] + part * (steps[after] - steps[before]))


@dataclass(frozen=True)
class GaussianFit:
    """A Gaussian with the mean and covariance of data, in the directions of the covariance's eigenvectors.

    Attributes:
        variances: float64 [R], along each group of directions.
        mean_squares: float64 [R], squared length of the mean in each group.
        counts: float64 [R], directions in each group; their sum is the dimension of the data.
    """

    variances: Array
    mean_squares: Array
    counts: Array

    @classmethod
    def of(cls, data: Tensor | NDArray[Any]) -> GaussianFit:
        """Fit data [N, ...], N >= 2, through a singular value decomposition of N × d numbers.

        Raises:
            ValueError: fewer than two points, or values that are not finite.
        """
        array = data.detach().cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)
        flat = array.reshape(len(array), -1).astype(np.float64)
        if len(flat) < 2 or not np.isfinite(flat).all():
            raise ValueError(f"data: expected at least two finite points, found shape {list(array.shape)}")
        mean = flat.mean(0)
        _, scales, directions = np.linalg.svd(flat - mean, full_matrices=False)
        along = np.square(directions @ mean)
        rest = flat.shape[1] - len(scales)  # directions in which the data do not vary
        if not rest:
            return cls(np.square(scales) / len(flat), along, np.ones(len(scales)))
        outside = max(float(mean @ mean - along.sum()), 0.0)
        return cls(
            np.append(np.square(scales) / len(flat), 0.0),
            np.append(along, outside),
            np.append(np.ones(len(scales)), rest),
        )


def gaussian_relative_entropy(log_snr: NDArray[Any], fit: GaussianFit, process: Process = "vp") -> Array:
    """Relative entropy of the marginals of neighbouring noise levels, for data that are Gaussian.

    Of x = α x_0 + σ ε the marginal is N(α μ, α² Σ + σ²), so with λ_i the eigenvalues of Σ, m_i the mean's
    components along its eigenvectors, v_i = α² λ_i + σ² and primes on the less noisy level of the two,

        KL(p' ‖ p) / d = 1 / (2 d) Σ_i [v_i' / v_i − 1 − ln(v_i' / v_i) + (α' − α)² m_i² / v_i].

    Args:
        log_snr: [T], ln(α² / σ²), finite and strictly monotone.
        fit: the data.
        process: how α and σ follow from the log-SNR: "vp", α² + σ² = 1 (DDPM); "ve", α = 1 (EDM); "flow",
            α + σ = 1.

    Returns:
        float64 [T - 1]: entry i is of the levels i and i + 1, per dimension, in nats.

    Raises:
        ValueError: the log-SNR or the process is not as stated.
    """
    levels = _checked(log_snr)
    signal, noise = _scales(levels, process)
    signal_square, noise_square = np.square(signal)[:, None], np.square(noise)[:, None]
    variance = signal_square * fit.variances + noise_square
    rising = levels[-1] > levels[0]  # the noisiest first
    less, more = (slice(1, None), slice(None, -1)) if rising else (slice(None, -1), slice(1, None))
    # v' / v - 1, from differences that are small themselves.
    change = (signal_square[less] - signal_square[more]) * fit.variances
    change = (change + noise_square[less] - noise_square[more]) / variance[more]
    spread = _minus_log(change, np.log(variance[less]) - np.log(variance[more]))
    shift = np.square(signal[less] - signal[more])[:, None] * fit.mean_squares / variance[more]
    return (spread * fit.counts + shift).sum(1) / (2.0 * fit.counts.sum())


def _minus_log(change: Array, log: Array) -> Array:
    """x - ln(1 + x) from x and ln(1 + x), by its series where both are nearly the same."""
    series = np.square(change) * (1 / 2 - change * (1 / 3 - change * (1 / 4 - change / 5)))
    return np.where(np.abs(change) < 1e-3, series, change - log)


def conditional_relative_entropy(log_snr: NDArray[Any], mean_square: float, process: Process = "vp") -> Array:
    """Relative entropy of the noisy versions of one data point at neighbouring noise levels.

    KL(q(x' | x_0) ‖ q(x | x_0)) / d, in the mean over the data: what `gaussian_relative_entropy` is for data of
    variance 0. A proxy for the relative entropy of the marginals, which it bounds from above.

    Args:
        log_snr: [T]; see `gaussian_relative_entropy`.
        mean_square: E ‖x_0‖² / d of the data.
        process: see there.

    Returns:
        float64 [T - 1], likewise.

    Raises:
        ValueError: the log-SNR or the process is not as stated, or the mean square is negative.
    """
    if not mean_square >= 0.0:
        raise ValueError(f"mean_square: expected a number >= 0, found {mean_square}")
    point = GaussianFit(np.zeros(1), np.array([float(mean_square)]), np.ones(1))
    return gaussian_relative_entropy(log_snr, point, process)


def _checked(log_snr: NDArray[Any]) -> Array:
    values = np.asarray(log_snr, dtype=np.float64)
    steps = np.diff(values) if values.ndim == 1 else np.zeros(0)
    if not steps.size or not np.isfinite(values).all() or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(
            "log_snr: expected at least two finite and strictly monotone values [T], found others"
        )
    return values


def _scales(log_snr: Array, process: str) -> tuple[Array, Array]:
    """α and σ."""
    if process not in get_args(Process):
        raise ValueError(f"process: expected one of {', '.join(get_args(Process))}, found {process!r}")
    if process == "ve":
        return np.ones_like(log_snr), np.exp(-log_snr / 2)
    if process == "flow":
        return _sigmoid(log_snr / 2), _sigmoid(-log_snr / 2)
    return np.sqrt(_sigmoid(log_snr)), np.sqrt(_sigmoid(-log_snr))


def _sigmoid(values: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -values))
