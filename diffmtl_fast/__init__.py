"""Multi-task training of diffusion models at the speed of plain training."""

from __future__ import annotations

from . import analysis, clustering, curriculum, diffusion, ops
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
    LossSecondMomentSampler,
    StratifiedSampler,
    TimestepSampler,
    UniformSampler,
)
from .gradients import ClusteredMTL, StepRecord
from .weighting import (
    Equal,
    GramianWeighting,
    LossWeighting,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
    param_groups,
)

__version__ = "0.1.0"

__all__ = [
    "ClusterPath",
    "ClusteredMTL",
    "DifficultyCurriculum",
    "DistributionSampler",
    "Equal",
    "GramianWeighting",
    "IntervalClustering",
    "LossSecondMomentSampler",
    "LossWeighting",
    "NashMTL",
    "NoiseClustering",
    "PCGrad",
    "StepRecord",
    "StratifiedSampler",
    "TimestepSampler",
    "UncertaintyWeighting",
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
    "param_groups",
]
