"""Per-cluster gradients for the price of one backward."""

from __future__ import annotations

from .clustered import ClusteredMTL, StepRecord
from .layout import Clusters
from .rules import ClusterRule, NoClusterRule, RuleContext, register_cluster_rule

__all__ = [
    "ClusterRule",
    "ClusteredMTL",
    "Clusters",
    "NoClusterRule",
    "RuleContext",
    "StepRecord",
    "register_cluster_rule",
]
