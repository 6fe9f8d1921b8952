"""Exact interval clustering of timesteps: costs, solvers and the clustering they return."""

from __future__ import annotations

from .intervals import IntervalClustering
from .solve import cluster_affinity, cluster_snr, cluster_timesteps

__all__ = ["IntervalClustering", "cluster_affinity", "cluster_snr", "cluster_timesteps"]
