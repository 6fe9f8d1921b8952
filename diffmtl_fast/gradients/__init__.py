"""Per-cluster gradients for the price of one backward."""

from __future__ import annotations

from .batch import Clusters
from .cluster_jacobian import ClusterJacobian
from .clustered import ClusteredMTL, StepRecord
from .rules import ClusterRule, NoClusterRule, RuleContext, register_cluster_rule

__all__ = [
    "ClusterJacobian",
    "ClusterRule",
    "ClusteredMTL",
    "Clusters",
    "NoClusterRule",
    "RuleContext",
    "StepRecord",
    "register_cluster_rule",
]
