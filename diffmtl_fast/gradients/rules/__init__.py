"""Cluster rules: how an operation forms the gradients of its parameters, one per cluster. A file per family."""

from __future__ import annotations

from . import contraction, convolution, embedding, linear, normalisation  # each registers its rules
from .broadcast import PER_SAMPLE
from .registry import (
    RULES,
    ClusterRule,
    NoClusterRule,
    Registered,
    RuleContext,
    WrongRule,
    register_cluster_rule,
)

__all__ = [
    "PER_SAMPLE",
    "RULES",
    "ClusterRule",
    "NoClusterRule",
    "Registered",
    "RuleContext",
    "WrongRule",
    "contraction",
    "convolution",
    "embedding",
    "linear",
    "normalisation",
    "register_cluster_rule",
]
