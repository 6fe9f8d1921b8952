"""Which noise levels training sees when: the difficulty curriculum and other timestep samplers."""

from __future__ import annotations

from ._base import TimestepSampler
from .difficulty import DifficultyCurriculum
from .samplers import DistributionSampler, StratifiedSampler, UniformSampler
from .second_moment import LossSecondMomentSampler

__all__ = [
    "DifficultyCurriculum",
    "DistributionSampler",
    "LossSecondMomentSampler",
    "StratifiedSampler",
    "TimestepSampler",
    "UniformSampler",
]
