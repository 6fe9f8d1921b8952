"""Multi-task training of diffusion models at the speed of plain training."""

from __future__ import annotations

from . import ops
from .clustering import IntervalClustering, cluster_affinity, cluster_snr, cluster_timesteps
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
    "ClusteredMTL",
    "Equal",
    "GramianWeighting",
    "IntervalClustering",
    "LossWeighting",
    "NashMTL",
    "PCGrad",
    "StepRecord",
    "UncertaintyWeighting",
    "cluster_affinity",
    "cluster_snr",
    "cluster_timesteps",
    "ops",
    "param_groups",
]
