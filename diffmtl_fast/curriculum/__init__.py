"""Which noise levels training sees when: the difficulty curriculum and other timestep samplers."""

from __future__ import annotations

from .difficulty_curriculum import DifficultyCurriculum
from .loss_sampler import LossSampler
from .range_sampler import RangeSampler
from .samplers import DistributionSampler, StratifiedSampler, UniformSampler
from .second_moment import LossSecondMomentSampler
from .speed_sampler import SpeeDSampler
from .timestep_sampler import TimestepSampler

__all__ = [
    "DifficultyCurriculum",
    "DistributionSampler",
    "LossSampler",
    "LossSecondMomentSampler",
    "RangeSampler",
    "SpeeDSampler",
    "StratifiedSampler",
    "TimestepSampler",
    "UniformSampler",
]
