"""A loss that draws the times itself: clusters are looked up, or the times are drawn by cluster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffmtl_fast as dm
from diffmtl_fast.adapters.drawn_times import LooksUpClusters, stratified_sample
from diffmtl_fast.clustering import UniformTime


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.channels, self.layer = 3, nn.Linear(4, 3)

    def forward(self, x, t):
        return self.layer(torch.cat([x, t.view(-1, 1)], 1))


class Transport:
    """A loss of SiT's kind."""

    def sample(self, x1):
        return torch.rand(len(x1)), torch.randn_like(x1), x1

    def training_losses(self, model, x1):
        t, x0, x1 = self.sample(x1)
        self.drawn = t, x0
        target = t[:, None] * x1 + (1 - t[:, None]) * x0
        return {"loss": (model(target, t) - (x1 - x0)).square().mean(1)}


@pytest.mark.parametrize("stratified", [False, True])
def test_gradients_are_those_of_the_clusters_of_the_drawn_times(stratified):
    torch.manual_seed(0)
    clusters, transport, x1 = dm.cluster_noise(UniformTime(data_at=1), k=3), Transport(), torch.randn(9, 3)
    if stratified:
        transport.sample = stratified_sample(clusters)
    mtl = dm.ClusteredMTL(Velocity(), 3, dm.UPGrad())
    plain = copy.deepcopy(mtl)
    mtl.backward(transport.training_losses(LooksUpClusters(mtl, clusters), x1)["loss"])
    t, x0 = transport.drawn
    cluster = clusters.assign(t)
    if stratified:
        assert torch.bincount(cluster, minlength=3).tolist() == [3, 3, 3]
    transport.sample = lambda x1: (t, x0, x1)
    expected = transport.training_losses(lambda x, t: plain(x, t, cluster=cluster), x1)["loss"]
    plain.backward(expected)
    torch.testing.assert_close(mtl.module.layer.weight.grad, plain.module.layer.weight.grad)


def test_the_model_is_asked_for_everything_else():
    mtl = dm.ClusteredMTL(Velocity(), 3, dm.UncertaintyWeighting(3))
    model = LooksUpClusters(mtl, dm.cluster_noise(UniformTime(), k=3))
    assert model.channels == 3
    assert model.layer is mtl.module.layer
    with pytest.raises(AttributeError, match="self_condition"):
        model.self_condition  # noqa: B018
    sigma = torch.rand(4, 1, 1, 1)  # as EDM2 has it
    assert model(torch.randn(4, 3), sigma).shape == (4, 3)
    other = LooksUpClusters(dm.ClusteredMTL(Velocity(), 3, dm.UncertaintyWeighting(3)), model.clusters)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.layer.weight, model.layer.weight)
