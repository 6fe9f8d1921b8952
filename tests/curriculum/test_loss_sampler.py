"""Levels drawn by their observed losses: against the formula, and what no loss may spoil."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffmtl_fast.clustering import IntervalClustering, LogNormalSigma, cluster_noise
from diffmtl_fast.curriculum import LossSampler

TIMESTEPS = IntervalClustering(np.array([0, 3, 6]))


def test_probabilities_follow_the_moving_averages(device):
    sampler = LossSampler(TIMESTEPS, decay=0.5, power=2.0, uniform_share=0.2)
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(sampler.probabilities, uniform)
    t = torch.tensor([0, 1, 1, 2, 3, 4], device=device)
    sampler.to(device).update(torch.tensor([1.0, 2.0, 4.0, math.nan, 1.0, math.inf], device=device), t)
    # Timesteps 2, 4 and 5 are unseen: they count as the mean of 1, 3 and 1.
    expected = torch.tensor([1.0, 3.0, 5 / 3, 1.0, 5 / 3, 5 / 3], dtype=torch.float64) ** 2
    expected = 0.8 * expected / expected.sum() + 0.2 * uniform
    torch.testing.assert_close(sampler.probabilities.cpu(), expected)
    sampler.update(torch.tensor([3.0], device=device), torch.tensor([0], device=device))
    assert sampler.averages[0] == 2.0
    torch.testing.assert_close(sampler.density(torch.arange(6, device=device)), sampler.probabilities)


def test_draws_follow_the_probabilities():
    sampler = LossSampler(TIMESTEPS, uniform_share=0.5)
    sampler.update(torch.tensor([0.0, 0, 0, 0, 0, 1]), torch.arange(6))
    t, cluster = sampler.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TIMESTEPS.assign(t), cluster)
    shares = torch.bincount(t, minlength=6) / len(t)
    torch.testing.assert_close(shares, sampler.probabilities.float(), rtol=0, atol=0.02)
    assert shares[5] > 0.5


def test_losses_of_zero_are_no_information():
    sampler = LossSampler(TIMESTEPS)
    sampler.update(torch.zeros(6), torch.arange(6))
    torch.testing.assert_close(sampler.probabilities, torch.full((6,), 1 / 6, dtype=torch.float64))


@pytest.mark.parametrize("clusters", [TIMESTEPS, cluster_noise(LogNormalSigma(), 2)])
def test_the_state_resumes(clusters):
    def make():
        return LossSampler(clusters, cells=5, generator=torch.Generator().manual_seed(0))

    one, other = make(), make()
    for _ in range(3):
        level, _ = one.sample(8)
        one.update(level.float() + 1, level)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.sample(9)[0], other.sample(9)[0])


def test_refuses():
    for name, value in (("decay", 1.0), ("power", math.inf), ("uniform_share", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: expected .*, found {value}"):
            LossSampler(TIMESTEPS, **{name: value})
    with pytest.raises(ValueError, match="cells: expected 1 … 6, found 7"):
        LossSampler(TIMESTEPS, cells=7)
