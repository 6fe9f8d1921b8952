# pyright: strict
"""A user's program, which `mypy --strict` and pyright accept: the public names and what they return have types."""

from __future__ import annotations

from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import diffmtl_fast as dm
from diffmtl_fast.gradients import ClusterJacobian, ClusterRule, Clusters, RuleContext, register_cluster_rule


class Doubled(dm.GramianWeighting):
    """A weighting of a user's own."""

    def forward(self, gramian: Tensor | None, present: Tensor | None = None) -> Tensor:
        """Return the weights."""
        assert gramian is not None
        return 2 * torch.ones_like(gramian.diagonal())


def gain(x: Tensor, weight: Tensor) -> Tensor:
    """An operation of a user's own."""
    return x * weight


@register_cluster_rule(gain)
class Gain(ClusterRule):
    """Its rule."""

    @staticmethod
    def forward(ctx: RuleContext, *args: Tensor) -> Tensor:
        """Compute the output."""
        ctx.save_for_backward(*args)
        return args[0] * args[1]

    @staticmethod
    def backward(ctx: RuleContext, grad: Tensor, clusters: Clusters) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        x, weight = ctx.saved_tensors
        return grad * weight, dm.ops.cluster_sum(grad * x, clusters.offsets(len(x)))


def train(model: nn.Module, images: Tensor) -> Tensor | None:
    """A training step."""
    clusters = assert_type(dm.cluster_snr(np.linspace(9.0, -9.0, 1000), k=5), dm.IntervalClustering)
    t, cluster = clusters.sample(len(images))
    assert_type(t, Tensor)
    weighting = dm.NashMTL(update_every=2)
    mtl = dm.ClusteredMTL(model, num_clusters=clusters.k, weighting=weighting)
    optimizer = torch.optim.AdamW(dm.param_groups(model, weighting, lr=1e-4))
    loss = assert_type(dm.ops.sample_mse(mtl(images, t, cluster=cluster), images), Tensor)
    mtl.backward(loss)
    optimizer.step()  # pyright: ignore[reportUnknownMemberType] (PyTorch's)
    record = mtl.last
    assert record is not None
    assert_type(record, dm.StepRecord)
    assert_type(record.weights, Tensor)
    return assert_type(record.conflicts, Tensor | None)


def sample(count: int) -> Tensor:
    """The samplers and clusterings."""
    tasks = dm.cluster_timesteps(1000, 5)
    curriculum = dm.DifficultyCurriculum(dm.cluster_timesteps(1000, 20), tasks=tasks)
    level, _cluster = curriculum.sample(count)
    curriculum.update(torch.zeros(count), level)
    levels = assert_type(dm.cluster_noise(dm.clustering.LogNormalSigma(-1.2, 1.2), 5), dm.NoiseClustering)
    sigma, _cluster = levels.sample(count)
    path = assert_type(dm.cluster_path(np.linspace(9.0, -9.0, 100), 10), dm.ClusterPath)
    assert path is not None
    return sigma * curriculum.weight(level)


def analyse(steps: NDArray[np.float64], images: Tensor) -> dm.analysis.Convergence:
    """The analyses."""
    fit = assert_type(dm.analysis.GaussianFit.of(images), dm.analysis.GaussianFit)
    entropy = dm.analysis.gaussian_relative_entropy(steps, fit) + dm.analysis.conditional_relative_entropy(
        steps, 1.0
    )
    return dm.analysis.convergence(dm.cluster_timesteps(1000, 5), steps, entropy)


WEIGHTINGS: list[dm.LossWeighting | dm.GramianWeighting] = [
    dm.Equal(), dm.UncertaintyWeighting(5), dm.DWA(5), dm.GLS(), dm.IMTLL(5), dm.RLW(), dm.ScaleInvariant(),
    dm.FAMO(5), dm.STCH(5), dm.PCGrad(), dm.NashMTL(), dm.MGDA(), dm.DualProj(), dm.CAGrad(), dm.IMTLG(),
    dm.GradVac(5), dm.AlignedMTL(), dm.FairGrad(), dm.UPGrad(), Doubled(),
]  # fmt: skip
JACOBIAN = ClusterJacobian(nn.Linear(4, 4), 5)
MATRIX: Tensor = dm.ops.gram(torch.randn(5, 7))
