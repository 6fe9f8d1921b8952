"""The published procedures in plain PyTorch, NumPy and cvxpy + ECOS.

One obvious implementation of what the library does fast: the oracle of its tests and the baseline of its
benchmarks. Written from the definitions of Go et al., "Addressing Negative Transfer in Diffusion Models"
(NeurIPS 2023), and of the methods it uses: PCGrad (Yu et al., 2020), Nash-MTL (Navon et al., 2022),
uncertainty weighting (Kendall et al., 2018). Where released code deviates from the definitions, the
docstrings say which way was taken.
"""

from .affinity import pairwise_cosines, timestep_gradients
from .clustering import affinity_cost, optimal_intervals, snr_cost, timestep_cost
from .gradients import ClusterGradients, cluster_gradients, cluster_means
from .steps import Batch, LossFn, nash_step, pcgrad_step, plain_step, uw_step
from .weighting import (
    NashError,
    nash_residual,
    nash_weights,
    pcgrad,
    random_orders,
    uncertainty_weighting,
    update_direction,
)

__all__ = [
    "Batch",
    "ClusterGradients",
    "LossFn",
    "NashError",
    "affinity_cost",
    "cluster_gradients",
    "cluster_means",
    "nash_residual",
    "nash_step",
    "nash_weights",
    "optimal_intervals",
    "pairwise_cosines",
    "pcgrad",
    "pcgrad_step",
    "plain_step",
    "random_orders",
    "snr_cost",
    "timestep_cost",
    "timestep_gradients",
    "uncertainty_weighting",
    "update_direction",
    "uw_step",
]
