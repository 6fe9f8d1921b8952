"""Analyses of the denoising tasks of a diffusion model."""

from __future__ import annotations

from .affinity import TaskAffinity, task_affinity
from .plots import plot_affinity
from .projection import RandomProjection

__all__ = ["RandomProjection", "TaskAffinity", "plot_affinity", "task_affinity"]
