"""Analyses of the denoising tasks of a diffusion model."""

from __future__ import annotations

from .affinity import TaskAffinity, task_affinity
from .difficulty import (
    Convergence,
    GaussianFit,
    conditional_relative_entropy,
    convergence,
    gaussian_relative_entropy,
)
from .frechet import FrechetDistance
from .inception import CleanInception, Inception
from .judge import Judge
from .negative_transfer import NegativeTransfer, SwitchedModel, negative_transfer
from .plots import plot_affinity, plot_convergence, plot_negative_transfer, plot_relative_entropy
from .projection import RandomProjection

__all__ = [
    "CleanInception",
    "Convergence",
    "FrechetDistance",
    "GaussianFit",
    "Inception",
    "Judge",
    "NegativeTransfer",
    "RandomProjection",
    "SwitchedModel",
    "TaskAffinity",
    "conditional_relative_entropy",
    "convergence",
    "gaussian_relative_entropy",
    "negative_transfer",
    "plot_affinity",
    "plot_convergence",
    "plot_negative_transfer",
    "plot_relative_entropy",
    "task_affinity",
]
