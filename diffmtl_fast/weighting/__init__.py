"""Weightings: cluster losses → one scalar, or the Gramian of the cluster gradients → weights."""

from __future__ import annotations

from ._base import GramianWeighting, LossWeighting
from .equal import Equal
from .groups import param_groups
from .nash import NashMTL
from .pcgrad import PCGrad
from .uncertainty import UncertaintyWeighting

__all__ = [
    "Equal",
    "GramianWeighting",
    "LossWeighting",
    "NashMTL",
    "PCGrad",
    "UncertaintyWeighting",
    "param_groups",
]
