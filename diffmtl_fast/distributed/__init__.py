"""Processes that train replicas of one model: what they exchange so that a step is that of the whole batch.

`gradients` imports this package and hands it what it needs; nothing here imports `gradients`.
"""

from __future__ import annotations

from .arrivals import Arrivals, PlainArrivals, refuse_sparse
from .group_reference import GroupReference
from .ranks import Ranks
from .replicas import Alone, Replicas, find_group, refuse_outer_wrapper
from .settling import settle
from .sharded_jacobian import ShardedJacobian

__all__ = [
    "Alone",
    "Arrivals",
    "GroupReference",
    "PlainArrivals",
    "Ranks",
    "Replicas",
    "ShardedJacobian",
    "find_group",
    "refuse_outer_wrapper",
    "refuse_sparse",
    "settle",
]
