"""Importance sampling by losses: against the published procedure in plain Python, and unbiased."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast.clustering import IntervalClustering, LogNormalSigma, NoiseClustering, cluster_noise
from diffmtl_fast.curriculum import LossSecondMomentSampler

T = 6
ONE = IntervalClustering(np.array([0, T]))
THREE = IntervalClustering(np.array([0, 1, 4, T]))


class Published:
    """A list of the last losses for every timestep."""

    def __init__(self, size, uniform):
        self.history = [[] for _ in range(T)]
        self.size, self.uniform = size, uniform

    def update(self, losses, timesteps):
        for loss, t in zip(losses, timesteps, strict=True):
            if math.isfinite(loss):
                self.history[t] = [*self.history[t], loss][-self.size :]

    def probabilities(self):
        if any(len(past) < self.size for past in self.history):
            return np.full(T, 1 / T)
        roots = np.array([np.sqrt(np.mean(np.square(past))) for past in self.history])
        return (1 - self.uniform) * roots / roots.sum() + self.uniform / T


@given(
    batches=st.lists(
        st.lists(
            st.tuples(st.one_of(st.floats(0.1, 9), st.just(math.nan)), st.integers(0, T - 1)),
            min_size=1,
            max_size=30,
        ),
        min_size=1,
        max_size=6,
    ),
    size=st.integers(1, 4),
    uniform=st.sampled_from([0.001, 0.3, 1.0]),
)
@settings(deadline=None, max_examples=60)
def test_probabilities_and_weights_are_the_published_ones(batches, size, uniform):
    sampler = LossSecondMomentSampler(ONE, history=size, uniform_share=uniform)
    published = Published(size, uniform)
    t = torch.arange(T)
    for batch in batches:
        losses, timesteps = zip(*batch, strict=True)
        sampler.update(torch.tensor(losses, dtype=torch.float64), torch.tensor(timesteps))
        published.update(losses, timesteps)
        expected = published.probabilities()
        np.testing.assert_allclose(sampler.density(t), expected, rtol=1e-12)
        np.testing.assert_allclose(sampler.weight(t), 1 / (T * expected), rtol=1e-6)


def _warm(sampler, level, seed=0):
    """Give every cell its history: losses that grow with the cell."""
    generator = torch.Generator(level.device).manual_seed(seed)
    for i in range(sampler.history):
        size = torch.arange(1, len(level) + 1, device=level.device) ** 2
        noise = torch.rand(len(level), generator=generator, device=level.device)
        sampler.update(size * (0.5 + noise) * (1 + i), level)
    return sampler


@pytest.mark.parametrize("clusters", [ONE, THREE], ids=["one task", "three tasks"])
@pytest.mark.parametrize("cells", [None, 1, 4])
def test_weighted_means_expect_those_of_ordinary_training(clusters, cells, device):
    sampler = LossSecondMomentSampler(clusters, cells=cells, history=3).to(device)
    t = torch.arange(T, device=device)
    _warm(sampler, t)
    if cells == 1:
        sampler.update(torch.ones(9, device=device), t[:1].repeat(9))
    loss = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0], dtype=torch.float64, device=device)
    q, task = sampler.density(t), clusters.assign(t)
    assert float(q.sum()) == pytest.approx(1)
    assert (cells == 1) == torch.allclose(q, torch.full_like(q, 1 / T))
    for k in range(clusters.k):
        member = task == k
        # The mean over the samples of a task, drawn from q, in expectation.
        found = (q * sampler.weight(t) * loss)[member].sum() / q[member].sum()
        torch.testing.assert_close(found, loss[member].mean(), rtol=1e-6, atol=0)


def test_draws_follow_the_density(device):
    sampler = LossSecondMomentSampler(THREE).to(device)
    t = torch.arange(T, device=device)
    cold, _ = sampler.sample(12_000, generator=torch.Generator(device).manual_seed(0))
    _warm(sampler, t)
    warm, cluster = sampler.sample(12_000, generator=torch.Generator(device).manual_seed(0))
    assert torch.equal(THREE.assign(warm), cluster)
    for drawn, expected in (
        (cold, torch.full((T,), 1 / T, device=device).double()),
        (warm, sampler.density(t)),
    ):
        frequency = torch.bincount(drawn, minlength=T).double() / len(drawn)
        torch.testing.assert_close(frequency, expected, atol=5 * (0.25 / 12_000) ** 0.5, rtol=0)
    assert sampler.density(t)[-1] > 5 * sampler.density(t)[0]


def test_continuous_levels():
    clusters = cluster_noise(LogNormalSigma(), 2)
    sampler = LossSecondMomentSampler(clusters, cells=8, history=2)
    share = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    _warm(sampler, clusters.distribution.quantile(share))
    fine = (torch.arange(80_000, dtype=torch.float64) + 0.5) / 80_000
    level = clusters.distribution.quantile(fine)
    ratio = sampler.density(level) / clusters.distribution.density(level)  # q / p
    assert float(ratio.mean()) == pytest.approx(1, abs=1e-9)
    task, loss = clusters.assign(level), torch.sin(level) + 2
    for k in range(2):
        member = task == k
        found = (ratio * sampler.weight(level) * loss)[member].sum() / ratio[member].sum()
        assert float(found) == pytest.approx(float(loss[member].mean()), rel=1e-4)
    drawn, _ = sampler.sample(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cell = NoiseClustering(clusters.distribution, np.linspace(0, 1, 9)).assign(drawn)
    frequency = torch.bincount(cell, minlength=8).double() / 20_000
    torch.testing.assert_close(frequency, sampler.probabilities, atol=5 * (0.25 / 20_000) ** 0.5, rtol=0)


def test_losses_of_zero_leave_ordinary_training():
    sampler = LossSecondMomentSampler(ONE, history=1)
    sampler.update(torch.zeros(T), torch.arange(T))
    torch.testing.assert_close(sampler.density(torch.arange(T)), torch.full((T,), 1 / T).double())
    assert LossSecondMomentSampler(cluster_noise(LogNormalSigma(), 2)).probabilities.shape == (100,)


def test_state_resumes(device):
    one, other = (LossSecondMomentSampler(THREE, history=2).to(device) for _ in range(2))
    _warm(one, torch.arange(T, device=device))
    other.load_state_dict(one.state_dict())
    for seed in (1, 2):
        drawn = [s.sample(40, generator=torch.Generator(device).manual_seed(seed))[0] for s in (one, other)]
        assert torch.equal(*drawn)
        for sampler in (one, other):
            sampler.update(drawn[0].float() + 1, drawn[0])
    assert torch.equal(one.losses, other.losses)
    with pytest.raises(RuntimeError, match="size mismatch for losses"):
        LossSecondMomentSampler(THREE, history=3).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": 0}, "cells: expected 1 … 6, found 0"),
        ({"cells": 7}, "cells: expected 1 … 6, found 7"),
        ({"history": 0}, "history: expected at least 1, found 0"),
        ({"uniform_share": 0.0}, r"uniform_share: expected above 0 and at most 1, found 0\.0"),
        ({"uniform_share": 1.5}, r"uniform_share: expected above 0 and at most 1, found 1\.5"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        LossSecondMomentSampler(ONE, **options)


def test_bad_updates():
    sampler = LossSecondMomentSampler(ONE)
    with pytest.raises(
        ValueError, match=r"loss: expected \[B\] with the levels \[B\], found \[\] with no levels"
    ):
        sampler.update(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"found \[2\] with levels \[3\]"):
        sampler.update(torch.ones(2), torch.arange(3))
    with pytest.raises(TypeError, match=r"loss: expected a floating-point tensor \[B\], found torch\.int64"):
        sampler.update(torch.arange(3), torch.arange(3))
