"""Distributions of the noise level in training: EDM's σ, the times of flow matching.

Conventions: x = x_0 + σ ε with the log-SNR −2 ln σ, and x_t = (1 − t) x_0 + t ε with 2 ln((1 − t) / t). Every
method works on tensors of any shape, in float64 where accuracy counts; densities are defined inside the range
of the levels. ``data_at=1`` is for flow matching with the data at t = 1, as in SiT, x_t = t x_0 + (1 − t) ε: every
distribution of times t becomes that of 1 − t, so that a shift or a mean means as much noise as it does without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from .._data_at import DataAt, check_data_at
from .._extras import require
from .._mode_time import check_mode_scale, mode_density, mode_share, mode_time
from .._published_names import rename

_LOG_SQRT_TWO_PI = 0.5 * math.log(2.0 * math.pi)
# Quantiles of the beta distribution are interpolated between knots in logits of the probability. Both tails
# are straight lines there, so these ends are far enough out for every level a float64 draw can ask for.
_BETA_REACH = 42.0
_BETA_KNOTS = 4097
_BETA_LEAST, _BETA_MOST = 0.1, 1000.0


class _Sigma:
    """The levels are σ in (0, ∞)."""

    levels: ClassVar[str] = "σ"

    def log_snr(self, level: Tensor) -> Tensor:
        """−2 ln σ."""
        return -2.0 * level.log()

    def at_log_snr(self, log_snr: Tensor) -> Tensor:
        """σ of a log-SNR."""
        return torch.exp(-0.5 * log_snr)


@dataclass(frozen=True, repr=False)
class _Time:
    """The levels are times in (0, 1), with the data at one end: at 1 they are what is left of 1 by those at 0."""

    data_at: DataAt = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_data_at(self.data_at)

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "data_at" or self.data_at}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @property
    def levels(self) -> str:
        """What the levels are."""
        return "times" if self.data_at == 0 else "times with the data at 1"

    def _noise(self, time: Tensor) -> Tensor:
        """The share of noise at a time, and the time at a share."""
        return time if self.data_at == 0 else 1.0 - time

    def log_snr(self, level: Tensor) -> Tensor:
        """2 ln((1 − t) / t), where the data are at t = 0."""
        return self._log_snr(self._noise(level))

    def at_log_snr(self, log_snr: Tensor) -> Tensor:
        """t of a log-SNR."""
        return self._noise(self._at_log_snr(log_snr))

    def quantile(self, probability: Tensor) -> Tensor:
        """t below which this share of the training times lies."""
        return self._noise(self._quantile(self._noise(probability)))

    def cdf(self, level: Tensor) -> Tensor:
        """Share of the training times below t."""
        return self._noise(self._cdf(self._noise(level)))

    def density(self, level: Tensor) -> Tensor:
        """Probability per unit of t."""
        return self._density(self._noise(level))

    # The same where the data are at t = 0.

    def _log_snr(self, level: Tensor) -> Tensor:
        return 2.0 * (torch.log1p(-level) - level.log())

    def _at_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)

    def _quantile(self, probability: Tensor) -> Tensor:
        raise NotImplementedError

    def _cdf(self, level: Tensor) -> Tensor:
        raise NotImplementedError

    def _density(self, level: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class LogNormalSigma(_Sigma):
    """EDM's training distribution, ln σ ~ N(mean, std²) (Karras et al., NeurIPS 2022, arXiv 2206.00364).

    Raises:
        ValueError: ``std`` is not positive.
    """

    name: ClassVar[str] = "log_normal_sigma"
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_spread(self.mean, "std", self.std)

    def quantile(self, probability: Tensor) -> Tensor:
        """σ below which this share of the training levels lies."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(probability))

    def cdf(self, level: Tensor) -> Tensor:
        """Share of the training levels below σ."""
        return torch.special.ndtr((level.log() - self.mean) / self.std)

    def density(self, level: Tensor) -> Tensor:
        """Probability per unit of σ."""
        return _normal_density(level.log(), self.mean, self.std) / level


@dataclass(frozen=True, repr=False)
class UniformTime(_Time):
    """Flow matching with t ~ U(0, 1)."""

    name: ClassVar[str] = "uniform_time"

    def _quantile(self, probability: Tensor) -> Tensor:
        return probability.clone()

    def _cdf(self, level: Tensor) -> Tensor:
        return level.clamp(0.0, 1.0)

    def _density(self, level: Tensor) -> Tensor:
        return torch.ones_like(level)


@dataclass(frozen=True, repr=False)
class ShiftedTime(_Time):
    """Flow matching with t = s u / (1 + (s − 1) u), u ~ U(0, 1): more noise for larger images, by the shift s.

    Source: Esser et al., ICML 2024, arXiv 2403.03206, section 5.3.2 (s = 3 for 1024 × 1024 pixels).

    Raises:
        ValueError: ``shift`` is not positive.
    """

    name: ClassVar[str] = "shifted_time"
    shift: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_spread(0.0, "shift", self.shift)

    def _quantile(self, probability: Tensor) -> Tensor:
        return self.shift * probability / (1.0 + (self.shift - 1.0) * probability)

    def _cdf(self, level: Tensor) -> Tensor:
        inside = level.clamp(0.0, 1.0)
        return inside / (self.shift - (self.shift - 1.0) * inside)

    def _density(self, level: Tensor) -> Tensor:
        return self.shift / (self.shift - (self.shift - 1.0) * level) ** 2


@dataclass(frozen=True, repr=False)
class LogitNormalTime(_Time):
    """Flow matching with logit(t) ~ N(mean, std²) (Esser et al., ICML 2024, arXiv 2403.03206).

    Raises:
        ValueError: ``std`` is not positive.
    """

    name: ClassVar[str] = "logit_normal_time"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_spread(self.mean, "std", self.std)

    def _quantile(self, probability: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(probability))

    def _cdf(self, level: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(level) - self.mean) / self.std)

    def _density(self, level: Tensor) -> Tensor:
        return _normal_density(torch.logit(level), self.mean, self.std) / (level * (1.0 - level))


@dataclass(frozen=True, repr=False)
class ModeTime(_Time):
    """SD3's times with heavy tails around a mode: t = 1 − u − mode_scale (cos²(π u / 2) − 1 + u), u ~ U(0, 1).

    Source: Esser et al., ICML 2024, arXiv 2403.03206. `diffusion.mode_weight` is the weight at uniform times with
    the same expectation.

    Args:
        mode_scale: above −1 and below 2 / (π − 2) ≈ 1.75; middle times are favoured where it is positive.

    Raises:
        ValueError: ``mode_scale`` is out of range.
    """

    name: ClassVar[str] = "mode_time"
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode_scale(self.mode_scale)

    def _quantile(self, probability: Tensor) -> Tensor:
        return mode_time(probability, self.mode_scale)

    def _cdf(self, level: Tensor) -> Tensor:
        return mode_share(level.clamp(0.0, 1.0), self.mode_scale).to(level.dtype)

    def _density(self, level: Tensor) -> Tensor:
        return mode_density(level, self.mode_scale).to(level.dtype)


class _Laplace:
    """The log-SNR follows a Laplace distribution; how it becomes a level is another class's part."""

    mean: float
    scale: float

    if TYPE_CHECKING:

        def _log_snr(self, level: Tensor) -> Tensor: ...

        def _at_log_snr(self, log_snr: Tensor) -> Tensor: ...

    def _quantile(self, probability: Tensor) -> Tensor:
        upper = probability > 0.5
        tail = torch.where(upper, 1.0 - probability, probability)
        distance = -self.scale * torch.log(2.0 * tail)  # low levels have a high log-SNR
        return self._at_log_snr(self.mean + torch.where(upper, -distance, distance))

    def _cdf(self, level: Tensor) -> Tensor:
        distance = (self._log_snr(level) - self.mean) / self.scale
        tail = 0.5 * torch.exp(-distance.abs())
        return torch.where(distance > 0, tail, 1.0 - tail)

    def _log_snr_density(self, level: Tensor) -> Tensor:
        distance = (self._log_snr(level) - self.mean) / self.scale
        return torch.exp(-distance.abs()) / (2.0 * self.scale)


@dataclass(frozen=True)
class LaplaceSigma(_Sigma, _Laplace):
    """σ whose log-SNR follows Laplace(mean, scale) (Hang et al., ICCV 2025, arXiv 2407.03297: mean 0, scale
    0.5).

    Raises:
        ValueError: ``scale`` is not positive.
    """

    name: ClassVar[str] = "laplace_sigma"
    mean: float = 0.0
    scale: float = 0.5

    def __post_init__(self) -> None:
        _check_spread(self.mean, "scale", self.scale)

    _log_snr, _at_log_snr = _Sigma.log_snr, _Sigma.at_log_snr

    def quantile(self, probability: Tensor) -> Tensor:
        """σ below which this share of the training levels lies."""
        return self._quantile(probability)

    def cdf(self, level: Tensor) -> Tensor:
        """Share of the training levels below σ."""
        return self._cdf(level)

    def density(self, level: Tensor) -> Tensor:
        """Probability per unit of σ."""
        return self._log_snr_density(level) * 2.0 / level


@dataclass(frozen=True, repr=False)
class LaplaceTime(_Laplace, _Time):
    """Times whose log-SNR follows Laplace(mean, scale) (Hang et al., ICCV 2025, arXiv 2407.03297: mean 0,
    scale 0.5).

    Raises:
        ValueError: ``scale`` is not positive.
    """

    name: ClassVar[str] = "laplace_time"
    mean: float = 0.0
    scale: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_spread(self.mean, "scale", self.scale)

    def _density(self, level: Tensor) -> Tensor:
        return self._log_snr_density(level) * 2.0 / (level * (1.0 - level))


@dataclass(frozen=True, repr=False)
class BetaTime(_Time):
    """Flow matching with t ~ Beta(a, b), t = 1 pure noise; for example Beta(1.5, 1) (Black et al., arXiv
    2410.24164).

    Quantiles are interpolated to a relative error below 1e-8. Needs SciPy, which ``diffmtl-fast[train]``
    installs.

    Args:
        a: 0.1 … 1000; the density goes as t^(a − 1) near t = 0.
        b: 0.1 … 1000; the density goes as (1 − t)^(b − 1) near t = 1.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: ``a`` or ``b`` is out of range.
    """

    a: float
    b: float
    name: ClassVar[str] = "beta_time"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (_BETA_LEAST <= self.a <= _BETA_MOST and _BETA_LEAST <= self.b <= _BETA_MOST):
            raise ValueError(
                f"expected a and b from {_BETA_LEAST} to {_BETA_MOST:g}, found a={self.a}, b={self.b}"
            )
        require("scipy.special", "train")

    def _quantile(self, probability: Tensor) -> Tensor:
        logits, slopes = _beta_knots(self.a, self.b, probability.device)
        p = probability.double()
        asked = torch.log(p) - torch.log1p(-p)
        inside = asked.clamp(-_BETA_REACH, _BETA_REACH)
        step = 2.0 * _BETA_REACH / (_BETA_KNOTS - 1)
        left = ((inside + _BETA_REACH) / step).long().clamp(max=_BETA_KNOTS - 2)
        u = (inside + _BETA_REACH) / step - left
        # Cubic Hermite interpolation between the knots, a straight line beyond them.
        middle = (
            logits[left] * (1 + 2 * u) * (1 - u) ** 2
            + logits[left + 1] * u**2 * (3 - 2 * u)
            + step * u * (1 - u) * (slopes[left] * (1 - u) - slopes[left + 1] * u)
        )
        beyond = torch.where(asked < 0, slopes[0], slopes[-1]) * (asked - inside)
        ended = torch.where(asked == inside, middle, middle + beyond)
        return torch.sigmoid(ended).to(probability.dtype)

    def _cdf(self, level: Tensor) -> Tensor:
        inside = level.detach().double().cpu().clamp(0.0, 1.0).numpy()  # SciPy computes on the host
        return torch.as_tensor(require("scipy.special", "train").betainc(self.a, self.b, inside)).to(level)

    def _density(self, level: Tensor) -> Tensor:
        log_density = torch.special.xlogy(self.a - 1, level) + torch.special.xlog1py(self.b - 1, -level)
        return torch.exp(log_density - _log_beta(self.a, self.b))


NoiseDistribution: TypeAlias = (
    LogNormalSigma
    | UniformTime
    | ShiftedTime
    | LogitNormalTime
    | ModeTime
    | LaplaceSigma
    | LaplaceTime
    | BetaTime
)
"""A distribution of noise levels: one of the classes of this module."""

DISTRIBUTIONS: dict[str, type[NoiseDistribution]] = {
    kind.name: kind
    for kind in (
        LogNormalSigma, UniformTime, ShiftedTime, LogitNormalTime, ModeTime, LaplaceSigma, LaplaceTime, BetaTime
    )
}  # fmt: skip

#: Distributions of σ and of times by name.
SIGMA_LAWS: dict[str, Any] = {"log_normal": LogNormalSigma, "laplace": LaplaceSigma}
TIME_LAWS: dict[str, Any] = {
    "logit_normal": LogitNormalTime,
    "mode": ModeTime,
    "beta": BetaTime,
    "laplace": LaplaceTime,
}
LAWS = SIGMA_LAWS.keys() | TIME_LAWS.keys()


def named_law(laws: Mapping[str, Any], name: str, args: Mapping[str, Any]) -> Any:
    """A distribution by its name in `laws`, with arguments also under the names of training scripts.

    Raises:
        ValueError: an argument is out of range.
        TypeError: it has no such argument.
    """
    return laws[name](**rename(args, {"logit_mean": "mean", "logit_std": "std"}))


@lru_cache(maxsize=64)
def _beta_knots(a: float, b: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logit of the quantile at evenly spaced logits of the probability, and its slope there; float64."""
    betaincinv = require("scipy.special", "train").betaincinv
    knots = torch.linspace(-_BETA_REACH, _BETA_REACH, _BETA_KNOTS, dtype=torch.float64)
    tail = torch.sigmoid(-knots.abs()).numpy()
    # Each half from its own end, where a float64 resolves it.
    low = torch.logit(torch.from_numpy(betaincinv(a, b, tail)))
    high = -torch.logit(torch.from_numpy(betaincinv(b, a, tail)))
    logits = torch.where(knots < 0, low, high)
    log_sigmoid = torch.nn.functional.logsigmoid  # ln p = log_sigmoid(knots), ln t = log_sigmoid(logits)
    log_slopes = log_sigmoid(knots) + log_sigmoid(-knots) - a * log_sigmoid(logits) - b * log_sigmoid(-logits)
    slopes = torch.exp(log_slopes + _log_beta(a, b))
    return logits.to(device), slopes.to(device)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _normal_density(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / std) ** 2 - _LOG_SQRT_TWO_PI) / std


def _check_spread(mean: float, name: str, spread: float) -> None:
    if not (math.isfinite(mean) and 0 < spread < math.inf):
        raise ValueError(f"expected a finite mean and a positive {name}, found mean={mean}, {name}={spread}")
