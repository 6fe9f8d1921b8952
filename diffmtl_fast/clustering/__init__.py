"""Exact interval clustering of timesteps: costs, solvers and the clustering they return."""

from __future__ import annotations

from .costs import AbsoluteDeviation, Affinity, SquaredDeviation, UserCost
from .intervals import IntervalClustering
from .path import ClusterPath
from .solve import cluster_affinity, cluster_intervals, cluster_path, cluster_snr, cluster_timesteps

__all__ = [
    "AbsoluteDeviation",
    "Affinity",
    "ClusterPath",
    "IntervalClustering",
    "SquaredDeviation",
    "UserCost",
    "cluster_affinity",
    "cluster_intervals",
    "cluster_path",
    "cluster_snr",
    "cluster_timesteps",
]
