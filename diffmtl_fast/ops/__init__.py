"""Fused operators `diffmtl::*` and their plain-PyTorch definitions."""

from __future__ import annotations

import importlib.util
import logging

import torch

from . import cpu
from ._library import PLAIN, register_kernels
from .add_noise import add_noise
from .cluster_conv_wgrad import cluster_conv_wgrad
from .cluster_mean import cluster_mean
from .cluster_mse import cluster_mse
from .cluster_norm_backward import cluster_norm_backward
from .cluster_sum import cluster_sum
from .cluster_wgrad import cluster_wgrad
from .combine import combine, combine_
from .denoising_loss import denoising_loss, sample_huber
from .gradvac import gradvac_weights
from .gram import gram
from .gramian_weights import gramian_weights
from .group_norm_backward import group_norm_backward
from .nash import nash_weights
from .pcgrad import pcgrad_weights
from .philox import philox_normal
from .sample_mse import sample_mse
from .uncertainty_loss import uncertainty_loss

cpu.select_instruction_set()
register_kernels("CPU", cpu.kernels())
if torch.version.cuda or torch.version.hip:
    if importlib.util.find_spec("triton") is None:
        logging.getLogger("diffmtl_fast").warning(
            "Triton is not installed: on the GPU the ops run their plain definitions"
        )
    else:
        from . import cuda

        register_kernels("CUDA", cuda.kernels())

__all__ = [
    "PLAIN",
    "add_noise",
    "cluster_conv_wgrad",
    "cluster_mean",
    "cluster_mse",
    "cluster_norm_backward",
    "cluster_sum",
    "cluster_wgrad",
    "combine",
    "combine_",
    "denoising_loss",
    "gradvac_weights",
    "gram",
    "gramian_weights",
    "group_norm_backward",
    "nash_weights",
    "pcgrad_weights",
    "philox_normal",
    "sample_huber",
    "sample_mse",
    "uncertainty_loss",
]
