"""Samplers without memory: the density they state is the one they draw from."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from diffmtl_fast.clustering import (
    BetaTime,
    IntervalClustering,
    LaplaceSigma,
    LaplaceTime,
    LogitNormalTime,
    LogNormalSigma,
    ModeTime,
    NoiseClustering,
    UniformTime,
    cluster_noise,
)
from diffmtl_fast.curriculum import (
    DistributionSampler,
    RangeSampler,
    SpeeDSampler,
    StratifiedSampler,
    TimestepSampler,
    UniformSampler,
)
from diffmtl_fast.diffusion.named_schedules import named_log_snr

TIMESTEPS = IntervalClustering(np.array([0, 3, 4, 15, 20]))
LEVELS = named_log_snr("squaredcos_cap_v2", 20)
SIGMAS = cluster_noise(LogNormalSigma(), 3)
TIMES = NoiseClustering(UniformTime(), np.array([0.0, 0.1, 0.6, 1.0]))
DRAWS = 20_000


def for_timesteps():
    return {
        "uniform": UniformSampler(TIMESTEPS),
        "expert": UniformSampler(TIMESTEPS, only=2),
        "stratified": StratifiedSampler(TIMESTEPS),
        "logit-normal": DistributionSampler(TIMESTEPS, LogitNormalTime(0.3, 1.2)),
        "beta": DistributionSampler(TIMESTEPS, BetaTime(1.5, 0.8)),
        "laplace": DistributionSampler(TIMESTEPS, LaplaceSigma(0.0, 1.5), log_snr=LEVELS),
        "mode": DistributionSampler(TIMESTEPS, ModeTime(0.81)),
        "range": RangeSampler(TIMESTEPS, [(0, 2, 9), (5, 0, 20)]),
        "speed": SpeeDSampler(TIMESTEPS, LEVELS, suppression=4.0, least_change=0.5),
    }


def for_levels():
    return {
        "uniform": UniformSampler(SIGMAS),
        "expert": UniformSampler(SIGMAS, only=0),
        "stratified": StratifiedSampler(SIGMAS),
        "laplace-sigma": DistributionSampler(SIGMAS, LaplaceSigma()),
        "logit-normal": DistributionSampler(TIMES, LogitNormalTime()),
        "beta": DistributionSampler(TIMES, BetaTime(0.5, 2.0)),
        "mode": DistributionSampler(TIMES, ModeTime()),
        "range": RangeSampler(SIGMAS, [(0, 0.05, 0.7)]),
        "laplace-time": DistributionSampler(TIMES, LaplaceTime(1.0, 2.0)),
        "stratified-time": StratifiedSampler(TIMES),
    }


@pytest.mark.parametrize("name", for_timesteps())
def test_timesteps_follow_the_stated_probabilities(name, device):
    sampler, t = for_timesteps()[name], torch.arange(20, device=device)
    stated = sampler.density(t)
    assert (stated.dtype, stated.device) == (torch.float64, t.device)
    assert float(stated.sum()) == pytest.approx(1, abs=1e-12)
    drawn, cluster = sampler.sample(DRAWS, generator=torch.Generator(device).manual_seed(0))
    assert (drawn.dtype, cluster.dtype) == (torch.int64, torch.int64)
    assert torch.equal(TIMESTEPS.assign(drawn), cluster)
    assert (cluster.diff() >= 0).all()
    counts = torch.bincount(drawn, minlength=20).double()
    expected = DRAWS * stated
    assert (counts[expected == 0] == 0).all()
    usable = (expected > 0).cpu()
    # Rare timesteps share one cell, so that the chi-square approximation holds.
    rare = usable & (expected.cpu() < 5)
    cells = [(counts.cpu()[usable & ~rare], expected.cpu()[usable & ~rare])]
    cells.append((counts.cpu()[rare].sum()[None], expected.cpu()[rare].sum()[None]))
    found, wanted = (torch.cat(part) for part in zip(*cells, strict=True))
    keep = wanted > 0
    p = scipy.stats.chisquare(found[keep], wanted[keep] * found[keep].sum() / wanted[keep].sum()).pvalue
    assert p > 1e-4


@pytest.mark.parametrize("name", for_levels())
def test_levels_follow_the_stated_density(name, device):
    sampler = for_levels()[name]
    drawn, cluster = sampler.sample(DRAWS, generator=torch.Generator(device).manual_seed(0))
    assert drawn.dtype == torch.float32
    assert torch.equal(sampler.tasks.assign(drawn), cluster)
    assert (cluster.diff() >= 0).all()
    # The cumulative distribution by numerical integration of the density, over ordinary training's quantiles
    # (dp = ordinary density · dlevel), against the draws.
    ordinary = sampler.tasks.distribution
    share = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    level = ordinary.quantile(share)
    mass = sampler.density(level.to(device)).cpu() / ordinary.density(level) / len(share)
    assert float(mass.sum()) == pytest.approx(1, abs=5e-3)
    points = ordinary.cdf(drawn.double().cpu()).numpy()
    cdf = np.concatenate([[0.0], mass.cumsum(0).numpy() / float(mass.sum())])
    result = scipy.stats.kstest(points, lambda p: np.interp(p, np.linspace(0, 1, len(cdf)), cdf))
    assert result.pvalue > 1e-4


def test_exact_probabilities_of_timesteps():
    t = np.arange(21) / 20
    tables = {
        "uniform": np.full(20, 0.05),
        "expert": np.repeat([0, 0, 1 / 11, 0], [3, 1, 11, 5]),
        "stratified": np.repeat([1 / 12, 1 / 4, 1 / 44, 1 / 20], [3, 1, 11, 5]),
        "logit-normal": np.diff(scipy.stats.norm(0.3, 1.2).cdf(scipy.special.logit(t))),
        "beta": np.diff(scipy.stats.beta(1.5, 0.8).cdf(t)),
    }
    u = np.linspace(0, 1, 2_000_001)
    times = np.sort(1 - u - 0.81 * (np.cos(np.pi * u / 2) ** 2 - 1 + u))
    tables["mode"] = np.diff(np.searchsorted(times, t) / len(times))
    tables["range"] = np.repeat([0, 1 / 7, 0], [2, 7, 11])
    change = np.gradient(np.sqrt(1 / (1 + np.exp(LEVELS)))) * 20
    tables["speed"] = np.where(change < 0.5, 0.25, 1) / np.where(change < 0.5, 0.25, 1).sum()
    # Each timestep has the mass of the log-SNR nearer to its own than to its neighbours'.
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    ends = 2 * LEVELS[0] - middle[0], 2 * LEVELS[-1] - middle[-1]
    mass = -np.diff(scipy.stats.laplace(0.0, 1.5).cdf(np.array([ends[0], *middle, ends[1]])))
    tables["laplace"] = mass / mass.sum()
    for name, sampler in for_timesteps().items():
        found = sampler.density(torch.arange(20)).numpy()
        # The mode's table is counted.
        np.testing.assert_allclose(found, tables[name], rtol=1e-4 if name == "mode" else 1e-9, err_msg=name)


def test_order_of_the_schedule_does_not_matter():
    forth = DistributionSampler(TIMESTEPS, LaplaceSigma(1.0, 2.0), log_snr=LEVELS)
    back = DistributionSampler(TIMESTEPS, LaplaceSigma(1.0, 2.0), log_snr=LEVELS[::-1].copy())
    time = DistributionSampler(TIMESTEPS, LaplaceTime(1.0, 2.0), log_snr=torch.tensor(LEVELS))
    t = torch.arange(20)
    torch.testing.assert_close(forth.density(t), back.density(19 - t))
    torch.testing.assert_close(forth.density(t), time.density(t))


def test_stratified_is_the_sample_of_the_clusters(device):
    for clusters in (TIMESTEPS, SIGMAS):
        generator = torch.Generator(device)
        expected = clusters.sample(13, generator=generator.manual_seed(3))
        found = StratifiedSampler(clusters).sample(13, generator=generator.manual_seed(3))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_uniform_is_randint_sorted_by_cluster(device):
    generator = torch.Generator(device)
    t = torch.randint(20, (9,), device=device, generator=generator.manual_seed(3))
    found, _ = UniformSampler(TIMESTEPS).sample(9, generator=generator.manual_seed(3))
    assert torch.equal(found, t[TIMESTEPS.assign(t).argsort(stable=True)])
    whole = IntervalClustering(np.array([0, 20]))  # the loop of everybody, unsorted
    assert torch.equal(UniformSampler(whole).sample(9, generator=generator.manual_seed(3))[0], t)


@pytest.mark.parametrize("sampler", [*for_timesteps().values(), *for_levels().values()])
def test_interface(sampler, device):
    level, cluster = sampler.sample(5, device=device)
    assert level.shape == cluster.shape == (5,)
    assert level.device == cluster.device
    assert torch.equal(sampler.weight(level), torch.ones(5, device=device))
    assert sampler.update(torch.ones(5, device=device), level) is None
    assert sampler.density(level.view(1, 5)).shape == (1, 5)
    other, _ = sampler.sample(5, device=device, dtype=torch.float64)
    assert other.dtype == (torch.float64 if level.is_floating_point() else torch.int64)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        sampler.sample(0)
    assert "tasks=" in repr(sampler)


def test_an_own_generator_is_part_of_the_state(device):
    def make():
        return UniformSampler(TIMESTEPS, generator=torch.Generator(device).manual_seed(2))

    one, other = make(), make()
    one.sample(100)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.sample(50)[0], other.sample(50)[0])
    given = torch.Generator(device).manual_seed(7)
    before = one.generator.get_state()
    one.sample(5, generator=given)  # the one that is passed comes first
    assert torch.equal(one.generator.get_state(), before)


@pytest.mark.parametrize(
    ("clusters", "distribution", "log_snr", "message"),
    [
        (TIMESTEPS, LaplaceSigma(), None, r"log_snr: expected that of the timesteps, \[20\], for .* of σ"),
        (TIMESTEPS, LaplaceSigma(), LEVELS[:5], r"log_snr: expected \[T\] with T = 20 .* found \[5\]"),
        (TIMESTEPS, LaplaceSigma(), np.zeros(20), "log_snr: expected finite and strictly monotone"),
        (TIMESTEPS, LaplaceSigma(), np.append(LEVELS[:-1], -np.inf), "log_snr: expected finite"),
        (TIMESTEPS, LaplaceSigma(1e5, 0.1), LEVELS, "expected mass on the schedule's log-SNR, found none"),
        (SIGMAS, UniformTime(), None, "distribution: expected one of σ, as the clusters are"),
        (TIMES, LogNormalSigma(), None, "distribution: expected one of times"),
        (TIMES, UniformTime(), LEVELS, "log_snr: expected none for clusters of continuous levels"),
    ],
)
def test_what_does_not_fit_together(clusters, distribution, log_snr, message):
    with pytest.raises(ValueError, match=message):
        DistributionSampler(clusters, distribution, log_snr=log_snr)


def test_wrong_types():
    with pytest.raises(ValueError, match="only: expected 0 <= only < k = 4, found 4"):
        UniformSampler(TIMESTEPS, only=4)
    with pytest.raises(TypeError, match=r"distribution: expected one of LogNormalSigma, .*, found 'edm'"):
        DistributionSampler(TIMESTEPS, "edm")
    with pytest.raises(TypeError, match="clusters: expected an IntervalClustering or a NoiseClustering"):
        UniformSampler(1000)
    with pytest.raises(NotImplementedError, match="TimestepSampler must define _draw"):
        TimestepSampler(TIMESTEPS).sample(3)
    with pytest.raises(NotImplementedError, match="TimestepSampler must define density"):
        TimestepSampler(TIMESTEPS).density(torch.tensor([1]))


def test_ranges_follow_the_steps_and_resume():
    def make():
        return RangeSampler(
            TIMESTEPS,
            [(0, 10, 20), (2, 4, 20), (3, 0, 20)],
            generator=torch.Generator().manual_seed(0),
        )

    sampler, firsts = make(), []
    for _ in range(5):
        firsts.append((sampler.phase, int((sampler.density(torch.arange(20)) > 0).nonzero().min())))
        assert (sampler.density(sampler.sample(50)[0]) > 0).all()
        sampler.update(torch.ones(50))
    assert firsts == [(0, 10), (0, 10), (1, 4), (2, 0), (2, 0)]
    resumed, sampler = make(), make()
    for _ in range(2):
        sampler.sample(5)
        sampler.update(torch.ones(5))
    resumed.load_state_dict(sampler.state_dict())
    assert (resumed.steps, resumed.phase) == (2, 1)
    assert torch.equal(resumed.sample(9)[0], sampler.sample(9)[0])


def test_one_range_is_what_scripts_call_min_and_max_timestep():
    t = torch.arange(20)
    expected = RangeSampler(TIMESTEPS, [(0, 5, 12)]).density(t)
    assert torch.equal(RangeSampler(TIMESTEPS, min_timestep=5, max_timestep=12).density(t), expected)
    assert RangeSampler(TIMESTEPS, min_timestep=5).density(t).sum() == pytest.approx(1)
    assert RangeSampler(TIMESTEPS, max_timestep=5).density(t)[5:].sum() == 0


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(1, 0, 20)], "steps that begin at 0 and rise, found \\[1\\]"),
        ([(0, 0, 20), (0, 0, 20)], "steps that begin at 0 and rise"),
        ([], "steps that begin at 0 and rise"),
        ([(0, 5, 5)], "levels first < end within"),
        ([(0, 0, 21)], "levels first < end within"),
        ([(0, -1, 20)], "levels first < end within"),
        ([(0, 0.5, 20)], "expected whole timesteps, found 0.5"),
        ([(0, 20)], "expected \\(step, first, end\\)"),
    ],
)
def test_ranges_that_are_none(ranges, message):
    with pytest.raises(ValueError, match=message):
        RangeSampler(TIMESTEPS, ranges)


def test_speed_suppresses_the_noisy_end_alone():
    clusters = IntervalClustering(np.array([0, 1000]))
    density = SpeeDSampler(clusters, named_log_snr("linear", 1000)).density(torch.arange(1000))
    few = density < density.max() / 2
    assert few.diff().sum() == 1  # the others, and then the few
    assert few[-1]
    assert 0.1 < few.double().mean() < 0.5
    torch.testing.assert_close(density.max() / density.min(), torch.tensor(5.0, dtype=torch.float64))
    with pytest.raises(TypeError, match="clusters: expected an IntervalClustering, found NoiseClustering"):
        SpeeDSampler(SIGMAS, LEVELS)
    with pytest.raises(ValueError, match=r"log_snr: expected \[T\] with T = 20 of at least 2, found \[3\]"):
        SpeeDSampler(TIMESTEPS, LEVELS[:3])
    with pytest.raises(ValueError, match="expected suppression of at least 1"):
        SpeeDSampler(TIMESTEPS, LEVELS, suppression=0.5)
