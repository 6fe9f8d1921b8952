import copy
import itertools
import json
import pickle
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast.clustering import (
    BetaTime,
    LaplaceSigma,
    LaplaceTime,
    LogitNormalTime,
    LogNormalSigma,
    ModeTime,
    NoiseClustering,
    UniformTime,
    cluster_noise,
)

DISTRIBUTIONS = [
    LogNormalSigma(),
    LogNormalSigma(0.5, 2.0),
    UniformTime(),
    LogitNormalTime(),
    LogitNormalTime(0.3, 0.7),
    ModeTime(),
    ModeTime(-0.8),
    LaplaceSigma(),
    LaplaceTime(0.4, 1.3),
    BetaTime(1.5, 1.0),
    BetaTime(0.5, 3.0),
]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_quantile_and_cdf_are_inverse(distribution):
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    levels = distribution.quantile(p)
    torch.testing.assert_close(distribution.cdf(levels), p)
    assert (levels.diff() > 0).all()
    assert (distribution.log_snr(levels).diff() < 0).all()


def test_edm_quantiles():
    found = cluster_noise(LogNormalSigma(-1.2, 1.2), 8, cost="quantile")
    expected = [-1.2 + 1.2 * NormalDist().inv_cdf(i / 8) for i in range(1, 8)]
    np.testing.assert_allclose(np.log(found.edges[1:-1]), expected, rtol=1e-12)
    assert (found.edges[0], found.edges[-1]) == (0, np.inf)


def test_uniform_quantiles():
    np.testing.assert_allclose(
        cluster_noise(UniformTime(), 4, cost="quantile").edges, [0, 0.25, 0.5, 0.75, 1]
    )


@pytest.mark.parametrize("cost", ["absolute", "squared"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_edges_minimise_the_expected_cost(distribution, cost):
    # Numerical integration of the expected cost, on points the solver has not seen.
    points = distribution.log_snr(
        distribution.quantile((torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000)
    )

    def expected_cost(probabilities):
        total = 0.0
        cuts = np.round(np.asarray(probabilities) * len(points)).astype(int)
        for l, e in itertools.pairwise(cuts):
            part = points[l:e]
            total += float(
                (part - part.median()).abs().sum()
                if cost == "absolute"
                else part.var(correction=0) * len(part)
            )
        return total / len(points)

    found = cluster_noise(distribution, 4, cost=cost, resolution=25_000)
    best = expected_cost(found.probabilities)
    assert found.cost == pytest.approx(best, rel=2e-3)
    for j in (1, 2, 3):
        for shift in (-0.02, 0.02):
            moved = found.probabilities.copy()
            moved[j] += shift
            assert expected_cost(moved) > best


def test_optimal_two_means_of_a_normal_are_split_in_the_middle():
    found = cluster_noise(LogNormalSigma(0.0, 1.0), 2, cost="squared")
    assert found.edges[1] == pytest.approx(1.0, abs=1e-3)
    assert found.cost == pytest.approx(4 * (1 - 2 / np.pi), rel=1e-3)  # log-SNR = −2 ln σ has variance 4


def test_limits_and_auto():
    found = cluster_noise(LogNormalSigma(), 6, min_probability=0.15, max_probability=0.18)
    widths = np.diff(found.probabilities)
    assert widths.min() >= 0.15 - 1e-12
    assert widths.max() <= 0.18 + 1e-12
    assert 1 < cluster_noise(LogNormalSigma(), "auto", resolution=2000).k < 20


@pytest.mark.parametrize("cost", ["quantile", "absolute", "squared"])
@pytest.mark.parametrize("k", [3, 7, 49])
def test_limits_of_equal_shares_can_be_met(k, cost):
    resolution = 1000  # no multiple of k
    for limit in ({"min_probability": 1 / k}, {"max_probability": 1 / k}):
        found = cluster_noise(UniformTime(), k, cost=cost, resolution=resolution, **limit)
        widths = np.diff(found.probabilities)
        assert widths.min() > limit.get("min_probability", 0) - 1 / resolution
        assert widths.max() < limit.get("max_probability", 1) + 1 / resolution


@pytest.mark.parametrize("cost", ["quantile", "absolute"])
@pytest.mark.parametrize(
    ("k", "limits", "message"),
    [
        (3, (0.34, 1.0), r"min_probability <= 1 / k = 0\.333333 <= max_probability, found 0\.34 and 1"),
        (3, (0.0, 0.33), r"found 0\.0 and 0\.33"),
        (3, (-0.1, 1.0), r"0 <= min_probability <= max_probability <= 1, found -0\.1 and 1"),
        (3, (0.0, 1.5), r"0 <= min_probability <= max_probability <= 1, found 0\.0 and 1\.5"),
        (3, (0.0, np.nan), "found 0.* and nan"),
        (3, (0.5, 0.4), "found 0.5 and 0.4"),
        (0, (0.0, 1.0), "k: expected an integer of at least 1, found 0"),
    ],
)
def test_limits_that_cannot_be_met(k, limits, message, cost):
    with pytest.raises(ValueError, match=message):
        cluster_noise(UniformTime(), k, cost=cost, min_probability=limits[0], max_probability=limits[1])


def test_assign_refuses_nan():
    with pytest.raises(ValueError, match="level: expected noise levels, found NaN"):
        cluster_noise(UniformTime(), 3, cost="quantile").assign(torch.tensor([0.5, np.nan]))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.integers(1, 40),
    st.integers(0, 2**40),
    st.sampled_from(DISTRIBUTIONS),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(deadline=None)
def test_sample_is_stratified_and_assigned_back(widths, batch_size, seed, distribution, dtype):
    probabilities = np.cumsum([0, *widths]) / sum(widths)
    clusters = NoiseClustering(distribution, probabilities)
    # bfloat16 cannot tell many edges apart; wide clusters only.
    if dtype == torch.bfloat16 and min(widths) / sum(widths) < 0.05:
        return
    level, cluster = clusters.sample(batch_size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    assert (level.dtype, cluster.dtype) == (dtype, torch.int64)
    assert level.isfinite().all()
    assert torch.equal(clusters.assign(level), cluster)
    counts = torch.bincount(cluster, minlength=clusters.k)
    assert counts.max() - counts.min() == (1 if batch_size % clusters.k else 0)
    again, _ = clusters.sample(batch_size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    assert torch.equal(level, again)


def test_sample_follows_the_distribution_within_clusters():
    distribution = LogNormalSigma()
    clusters = NoiseClustering(distribution, [0.0, 0.2, 1.0])
    level, cluster = clusters.sample(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = distribution.cdf(level)
    for j, (low, high) in enumerate([(0.0, 0.2), (0.2, 1.0)]):
        inside = (p[cluster == j] - low) / (high - low)
        histogram = torch.histc(inside, 10, 0, 1) / len(inside)
        torch.testing.assert_close(
            histogram, torch.full_like(histogram, 0.1), atol=5 * (0.09 / 20_000) ** 0.5, rtol=0
        )


def test_assign(device):
    clusters = NoiseClustering(UniformTime(), [0, 0.25, 1])
    level = torch.tensor([[0.0, 0.2], [0.25, 1.0]], device=device)
    assert clusters.assign(level).tolist() == [[0, 0], [1, 1]]
    assert clusters.assign(torch.tensor([-1.0, 2.0], device=device)).tolist() == [0, 1]
    with pytest.raises(TypeError, match="expected a floating-point tensor"):
        clusters.assign(torch.tensor([1], device=device))


def test_nothing_waits_for_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("only a GPU can be waited for")
    clusters = cluster_noise(LogNormalSigma(), 5)
    generator = torch.Generator(device).manual_seed(0)
    clusters.assign(clusters.sample(7, generator=generator)[0])  # the edges are copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        level, _ = clusters.sample(7, generator=generator)
        clusters.assign(level)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_round_trips():
    for clusters in (
        cluster_noise(LogitNormalTime(0.1, 2.0), 3),
        cluster_noise(UniformTime(), 3, cost="quantile"),
    ):
        clusters.sample(3)
        for other in (
            NoiseClustering.from_dict(json.loads(json.dumps(clusters.to_dict(), allow_nan=False))),
            pickle.loads(pickle.dumps(clusters)),
            copy.deepcopy(clusters),
        ):
            assert other == clusters
            assert hash(other) == hash(clusters)
    assert "UniformTime(), k=3: 0 | 0.3333 | 0.6667 | 1" in repr(clusters)
    assert clusters != cluster_noise(UniformTime(), 4, cost="quantile")


def test_bad_input():
    with pytest.raises(ValueError, match=r"positive std, found mean=0\.0, std=0"):
        LogNormalSigma(0.0, 0)
    for bad in ([0.0, 0.5], [0.0, 0.5, 0.5, 1.0], [[0.0, 1.0]], [0.0, np.nan, 1.0]):
        with pytest.raises(ValueError, match="strictly increasing from 0 to 1"):
            NoiseClustering(UniformTime(), bad)
    with pytest.raises(ValueError, match="cost: expected quantile, absolute or squared, found 'l1'"):
        cluster_noise(UniformTime(), 3, cost="l1")
    with pytest.raises(ValueError, match="k: expected an integer"):
        cluster_noise(UniformTime(), "auto", cost="quantile")
    with pytest.raises(ValueError, match=r"expected the parameters .* of uniform_time, found .'mean'"):
        NoiseClustering.from_dict(
            {"distribution": {"name": "uniform_time", "mean": 0}, "probabilities": [0, 1], "cost": None}
        )
    with pytest.raises(TypeError, match="k: expected an integer, found None"):
        cluster_noise(UniformTime(), None, cost="quantile")
    with pytest.raises(TypeError, match=r"expected one of LogNormalSigma, .*, found 'edm'"):
        cluster_noise("edm", 3)
    with pytest.raises(TypeError, match="level: expected a floating-point tensor, found float"):
        cluster_noise(UniformTime(), 3, cost="quantile").assign(0.5)
    with pytest.raises(ValueError, match="min_probability"):
        cluster_noise(UniformTime(), 3, cost="quantile", min_probability=0.5)
    with pytest.raises(ValueError, match=r"distribution: expected one of .*, found 'gamma'"):
        NoiseClustering.from_dict({"distribution": {"name": "gamma"}, "probabilities": [0, 1], "cost": None})
