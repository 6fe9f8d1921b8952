"""Multi-task training of diffusion models at the speed of plain training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import analysis, clustering, curriculum, diffusion, ops, weighting
from .clustering import (
    ClusterPath,
    IntervalClustering,
    NoiseClustering,
    cluster_affinity,
    cluster_intervals,
    cluster_noise,
    cluster_path,
    cluster_snr,
    cluster_timesteps,
)
from .curriculum import (
    DifficultyCurriculum,
    DistributionSampler,
    LossSampler,
    LossSecondMomentSampler,
    RangeSampler,
    SpeeDSampler,
    StratifiedSampler,
    TimestepSampler,
    UniformSampler,
)
from .gradients import ClusteredMTL, StepRecord
from .weighting import *  # noqa: F403 - a class for every module of the folder

__version__ = "0.1.0"

__all__ = [
    "ClusterPath",
    "ClusteredMTL",
    "DifficultyCurriculum",
    "DistributionSampler",
    "IntervalClustering",
    "LossSampler",
    "LossSecondMomentSampler",
    "NoiseClustering",
    "RangeSampler",
    "SpeeDSampler",
    "StepRecord",
    "StratifiedSampler",
    "TimestepSampler",
    "UniformSampler",
    "analysis",
    "cluster_affinity",
    "cluster_intervals",
    "cluster_noise",
    "cluster_path",
    "cluster_snr",
    "cluster_timesteps",
    "clustering",
    "curriculum",
    "diffusion",
    "ops",
    "weighting",
]
if not TYPE_CHECKING:  # type checkers follow the star import above
    __all__ += weighting.__all__
