"""Flow matching with the data at t = 1: distributions, clusterings and curricula are those of 1 − t."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import diffmtl_fast as dm
from diffmtl_fast.clustering import (
    BetaTime,
    LaplaceTime,
    LogitNormalTime,
    ModeTime,
    NoiseClustering,
    ShiftedTime,
    UniformTime,
)

TIMES = [UniformTime(), ShiftedTime(), LogitNormalTime(0.5), ModeTime(), LaplaceTime(1.0), BetaTime(1.5, 1.0)]


@pytest.fixture(params=TIMES, ids=lambda distribution: distribution.name)
def pair(request):
    """A distribution with the data at 0, and at 1."""
    return request.param, replace(request.param, data_at=1)


def test_the_distribution_is_that_of_what_is_left_of_1(pair):
    at_0, at_1 = pair
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    torch.testing.assert_close(at_1.log_snr(t), at_0.log_snr(1 - t))
    torch.testing.assert_close(at_1.density(t), at_0.density(1 - t))
    torch.testing.assert_close(at_1.cdf(t), 1 - at_0.cdf(1 - t))
    torch.testing.assert_close(at_1.quantile(at_1.cdf(t)), t)
    torch.testing.assert_close(at_1.at_log_snr(at_1.log_snr(t)), t)
    assert (at_1.cdf(t).diff() > 0).all()


def test_noise_falls_with_time(pair):
    levels = torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert pair[0].log_snr(levels).diff() < 0 < pair[1].log_snr(levels).diff()


@pytest.mark.parametrize("cost", ["quantile", "absolute"])
def test_clusters_are_mirrored(pair, cost):
    at_0, at_1 = (dm.cluster_noise(distribution, k=4, cost=cost) for distribution in pair)
    np.testing.assert_allclose(at_1.edges, 1 - at_0.edges[::-1], atol=1e-3)
    t, cluster = at_1.sample(40)
    assert torch.equal(at_1.assign(t), cluster)
    assert NoiseClustering.from_dict(at_1.to_dict()) == at_1 != at_0


def test_only_data_at_1_are_told():
    assert dm.cluster_noise(ShiftedTime(), k=4).to_dict()["distribution"] == {
        "name": "shifted_time",
        "shift": 3.0,
    }
    assert repr(ShiftedTime()) == "ShiftedTime(shift=3.0)"
    assert repr(ShiftedTime(data_at=1)) == "ShiftedTime(data_at=1, shift=3.0)"


@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy"])
def test_a_curriculum_begins_at_the_end_that_it_says(pair, order):
    for distribution in pair:
        clusters = dm.cluster_noise(distribution, k=5)
        t, cluster = dm.DifficultyCurriculum(clusters, order=order).sample(50)
        levels = distribution.log_snr(t.double())
        noisiest = distribution.log_snr(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
        begins_noisy = levels.mean() < noisiest.median()
        assert begins_noisy == (order == "easy_to_hard")
        first = distribution.data_at == 1
        assert (cluster == (0 if first == (order == "easy_to_hard") else 4)).all()


def test_other_times_are_refused():
    with pytest.raises(ValueError, match="data_at: expected 0 or 1, found 2"):
        UniformTime(data_at=2)
    clusters = dm.cluster_noise(UniformTime(data_at=1), k=3)
    with pytest.raises(ValueError, match="expected one of times with the data at 1"):
        dm.curriculum.DistributionSampler(clusters, LogitNormalTime())
    with pytest.raises(ValueError, match="levels"):
        dm.DifficultyCurriculum(clusters, tasks=dm.cluster_noise(UniformTime(), k=3))
