"""What all samplers promise: no value is read from the device on which they draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmtl_fast._host import known_counts
from diffmtl_fast.clustering import (
    BetaTime,
    IntervalClustering,
    LaplaceSigma,
    LogitNormalTime,
    LogNormalSigma,
    NoiseClustering,
    UniformTime,
)
from diffmtl_fast.curriculum import (
    DifficultyCurriculum,
    DistributionSampler,
    LossSampler,
    LossSecondMomentSampler,
    RangeSampler,
    SpeeDSampler,
    StratifiedSampler,
    UniformSampler,
)

TIMESTEPS = IntervalClustering(np.array([0, 3, 4, 10, 12]))
TASKS = IntervalClustering(np.array([0, 5, 11, 12]))
SIGMAS = NoiseClustering(LogNormalSigma(), np.array([0.0, 0.3, 1.0]))
TIMES = NoiseClustering(UniformTime(), np.array([0.0, 0.3, 1.0]))

SAMPLERS = {
    "uniform": lambda: UniformSampler(TIMESTEPS),
    "uniform sigma": lambda: UniformSampler(SIGMAS),
    "stratified": lambda: StratifiedSampler(TIMESTEPS),
    "stratified sigma": lambda: StratifiedSampler(SIGMAS),
    "logit-normal": lambda: DistributionSampler(TIMESTEPS, LogitNormalTime()),
    "laplace": lambda: DistributionSampler(SIGMAS, LaplaceSigma()),
    "beta": lambda: DistributionSampler(TIMES, BetaTime(2.0, 1.0)),
    "second moment": lambda: LossSecondMomentSampler(TIMESTEPS),
    "second moment of sigma": lambda: LossSecondMomentSampler(SIGMAS, cells=7),
    "loss": lambda: LossSampler(TIMESTEPS),
    "loss of sigma": lambda: LossSampler(SIGMAS, cells=7),
    "range": lambda: RangeSampler(TIMESTEPS, [(0, 5, 11), (1, 0, 12)]),
    "range of sigma": lambda: RangeSampler(SIGMAS, min_timestep=0.5),
    "speed": lambda: SpeeDSampler(TIMESTEPS, np.linspace(5, -5, 12)),
    "union": lambda: DifficultyCurriculum(TIMESTEPS, smoothing=0.5),
    "clusters": lambda: DifficultyCurriculum(TIMESTEPS, sampling="clusters"),
    "tasks": lambda: DifficultyCurriculum(TIMESTEPS, tasks=TASKS, sampling="tasks", max_length=3),
    "sigma": lambda: DifficultyCurriculum(SIGMAS, sampling="clusters"),
}


def step(sampler, device):
    level, cluster = sampler.sample(7, device=device)
    loss = torch.ones(7, device=device)
    results = level, cluster, sampler.weight(level), sampler.density(level)
    sampler.update(loss, level)
    return results


def learns(sampler):
    return isinstance(sampler, DifficultyCurriculum | LossSampler | LossSecondMomentSampler)


@pytest.mark.parametrize("name", SAMPLERS)
def test_counts_are_known_unless_they_depend_on_losses(name):
    sampler = SAMPLERS[name]()
    _, cluster = sampler.sample(7, generator=torch.Generator().manual_seed(0))
    _, elsewhere = sampler.sample(7, device="meta", generator=torch.Generator().manual_seed(0))
    assert known_counts(elsewhere) == (None if learns(sampler) else cluster.bincount().tolist())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_generator_on_the_host_gives_every_device_the_same(name, device):
    here, there = (
        SAMPLERS[name]().sample(7, device=place, generator=torch.Generator().manual_seed(0))
        for place in ("cpu", device)
    )
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu())


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_value_is_read(name):
    # Meta tensors have none: reading one, or a shape that depends on one, is an error.
    sampler = SAMPLERS[name]()
    for _ in range(2):
        assert all(tensor.device.type == "meta" and tensor.shape == (7,) for tensor in step(sampler, "meta"))
    if isinstance(sampler, DifficultyCurriculum):
        with pytest.raises(RuntimeError, match="meta"):
            _ = sampler.phase


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_waits_for_a_gpu(name, device):
    if device.type != "cuda":
        pytest.skip("only a GPU can be waited for")
    sampler = SAMPLERS[name]()
    step(sampler, device)  # tables are copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(sampler, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_state_follows_the_draws(name, device):
    sampler = SAMPLERS[name]()
    step(sampler, "cpu")
    step(sampler, device)
    drawn_on = device.type if learns(sampler) else "cpu"
    assert {buffer.device.type for buffer in sampler.buffers()} == {drawn_on}
    step(sampler, "cpu")
    assert {buffer.device.type for buffer in sampler.buffers()} == {"cpu"}
