"""Levels are drawn where the generator is, by default on the host, and their counts go with them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffmtl_fast._host import known_counts
from diffmtl_fast.clustering import LogNormalSigma, cluster_noise, cluster_timesteps
from diffmtl_fast.clustering.drawing import places

CPU, META = torch.device("cpu"), torch.device("meta")
CLUSTERINGS = [cluster_timesteps(20, 3), cluster_noise(LogNormalSigma(), 3)]


def test_places():
    assert places(None, None) == (CPU, CPU)
    assert places("meta", None) == places("meta", torch.Generator()) == (META, CPU)
    there = SimpleNamespace(device=META)  # stands for a generator on another device
    assert places(None, there) == places("meta", there) == (META, META)
    with pytest.raises(ValueError, match="generator: expected one on the CPU or on cpu, found one on meta"):
        places("cpu", there)


@pytest.mark.parametrize("clusters", CLUSTERINGS)
def test_counts_are_known(clusters):
    cluster = clusters.sample(7, generator=torch.Generator().manual_seed(0))[1]
    level, elsewhere = clusters.sample(7, device="meta", generator=torch.Generator().manual_seed(0))
    assert (level.device, elsewhere.device) == (META, META)
    assert known_counts(elsewhere) == cluster.bincount().tolist()


@pytest.mark.parametrize("clusters", CLUSTERINGS)
def test_a_generator_on_the_host_gives_every_device_the_same(clusters, device):
    batches = [
        clusters.sample(7, device=place, generator=torch.Generator().manual_seed(0))
        for place in ("cpu", device)
    ]
    for here, there in zip(*batches, strict=True):
        assert there.device.type == device.type
        assert torch.equal(here, there.cpu())
    first = torch.zeros(5, dtype=torch.int64)
    drawn = [
        clusters.draw(first.to(place), first.to(place) + 1, generator=torch.Generator().manual_seed(0))
        for place in ("cpu", device)
    ]
    torch.testing.assert_close(drawn[0], drawn[1].cpu())
