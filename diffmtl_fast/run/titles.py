"""Methods, clusters and curricula in words, for pictures and messages."""

from __future__ import annotations

from ..train.config import CONTINUOUS, PLAIN, Clusters, Config
from ..weighting import METHODS

METHOD_TITLES = {PLAIN: "plain training", CONTINUOUS: "continuous uncertainty weighting"} | {
    name: method.title for name, method in METHODS.items()
}
ORDER_TITLES = {"none": "", "easy_to_hard": ", curriculum", "hard_to_easy": ", anti-curriculum"}
LOSS_TITLES = {
    "none": "",
    "min_snr": ", Min-SNR",
    "soft_min_snr": ", soft Min-SNR",
    "p2": ", P2",
    "debiased": ", debiased estimation",
    "edm": ", EDM weights",
    "truncated_snr": ", truncated SNR",
    "logit_normal": ", logit-normal weights",
    "mode": ", mode weights",
    "cosmap": ", CosMap",
    "sigma_sqrt": ", sigma squared",
}
COST_TITLES = {"snr": "log-SNR", "squared": "k-means log-SNR", "timestep": "timestep", "affinity": "affinity"}


def clusters_title(clusters: Clusters) -> str:
    """The clusters in words."""
    number = "" if clusters.k == "auto" else f"{clusters.k} "
    return f"{number}{COST_TITLES[clusters.cost]} cluster" + "s" * (clusters.k != 1)


def method_title(config: Config) -> str:
    """The method, its clusters, the curriculum and the loss weights in words."""
    more = ORDER_TITLES[config.curriculum.order] + LOSS_TITLES[config.loss.weight]
    return f"{METHOD_TITLES[config.method]}, {clusters_title(config.clusters)}{more}"
