"""Which noise levels training sees when: the difficulty curriculum and other timestep samplers."""

from __future__ import annotations

from .difficulty_curriculum import DifficultyCurriculum
from .samplers import DistributionSampler, StratifiedSampler, UniformSampler
from .second_moment import LossSecondMomentSampler
from .timestep_sampler import TimestepSampler

__all__ = [
    "DifficultyCurriculum",
    "DistributionSampler",
    "LossSecondMomentSampler",
    "StratifiedSampler",
    "TimestepSampler",
    "UniformSampler",
]
