"""Exact interval clustering of timesteps: costs, solvers and the clustering they return."""

from __future__ import annotations

from .continuous import NoiseClustering, cluster_noise
from .costs import AbsoluteDeviation, Affinity, FunctionCost, MatrixCost, SquaredDeviation
from .distributions import (
    BetaTime,
    LaplaceSigma,
    LaplaceTime,
    LogitNormalTime,
    LogNormalSigma,
    ModeTime,
    NoiseDistribution,
    ShiftedTime,
    UniformTime,
)
from .intervals import IntervalClustering
from .path import ClusterPath
from .solve import cluster_affinity, cluster_intervals, cluster_path, cluster_snr, cluster_timesteps

__all__ = [
    "AbsoluteDeviation",
    "Affinity",
    "BetaTime",
    "ClusterPath",
    "FunctionCost",
    "IntervalClustering",
    "LaplaceSigma",
    "LaplaceTime",
    "LogNormalSigma",
    "LogitNormalTime",
    "MatrixCost",
    "ModeTime",
    "NoiseClustering",
    "NoiseDistribution",
    "ShiftedTime",
    "SquaredDeviation",
    "UniformTime",
    "cluster_affinity",
    "cluster_intervals",
    "cluster_noise",
    "cluster_path",
    "cluster_snr",
    "cluster_timesteps",
]
