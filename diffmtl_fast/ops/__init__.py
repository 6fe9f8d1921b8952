"""Fused operators `diffmtl::*` and their plain-PyTorch definitions."""

from __future__ import annotations

from .cluster_mean import cluster_mean
from .cluster_mse import cluster_mse
from .combine import combine
from .gram import gram
from .nash import nash_weights
from .pcgrad import pcgrad_weights
from .sample_mse import sample_mse

__all__ = [
    "cluster_mean",
    "cluster_mse",
    "combine",
    "gram",
    "nash_weights",
    "pcgrad_weights",
    "sample_mse",
]
