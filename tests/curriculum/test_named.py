"""Samplers by name, and the table of what all of them draw."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from diffmtl_fast.clustering import LogNormalSigma, cluster_noise, cluster_snr
from diffmtl_fast.curriculum import StratifiedSampler
from diffmtl_fast.curriculum.named import SamplerName, all_densities, interval_sampler, named_sampler

LEVELS = np.linspace(6.0, -6.0, 20)
TASKS = cluster_snr(LEVELS, 3)
SIGMAS = cluster_noise(LogNormalSigma(), 3)


def test_the_log_snr_is_asked_for_only_where_it_is_needed():
    def absent():
        raise AssertionError

    assert isinstance(named_sampler("stratified", TASKS, {}, absent), StratifiedSampler)
    assert named_sampler("mode", TASKS, {"mode_scale": 0.5}, absent).tasks == TASKS
    with pytest.raises(AssertionError):
        named_sampler("speed", TASKS, {}, absent)


def test_speed_is_of_timesteps_alone():
    with pytest.raises(ValueError, match="expected one of continuous noise levels, found speed"):
        named_sampler("speed", SIGMAS, {}, lambda: LEVELS)


def test_an_interval_of_continuous_levels():
    sampler = interval_sampler(SIGMAS, 250, 500, 1000)
    level, _ = sampler.sample(400, generator=torch.Generator().manual_seed(0))
    low, high = SIGMAS.distribution.quantile(torch.tensor([0.25, 0.5]).double()).tolist()
    assert low <= level.min()
    assert level.max() <= high
    with pytest.raises(ValueError, match="expected an end of at most 1000, found 1001"):
        interval_sampler(SIGMAS, 0, 1001, 1000)


def test_all_densities_are_probabilities():
    found = all_densities(TASKS, LEVELS)
    assert list(found) == [*get_args(SamplerName), "curriculum"]
    for cases in found.values():
        for values in cases.values():
            assert values.shape == (20,)
            assert values.sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="expected at least 2 timesteps, found 1"):
        all_densities(cluster_snr(LEVELS[:1], 1), LEVELS[:1])
