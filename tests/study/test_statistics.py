"""Differences within seeds and rank correlations against textbook values and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diffmtl_fast.study.statistics import (
    blocked_differences,
    matrix_correlation,
    rank_correlation,
    relative_differences,
)

MANY = [(j, 0) for j in range(1, 12)]  # eleven methods and a baseline


def test_one_pair_is_a_paired_t_test():
    values = np.array([[0.4, 0.3, 0.9, 0.1], [0.1, 0.2, 0.3, -0.1]])
    found = blocked_differences(values, [(0, 1)])
    expected = stats.ttest_rel(*values).confidence_interval(0.95)
    assert (found.low[0], found.high[0]) == pytest.approx((expected.low, expected.high))
    assert found.freedom == 3
    assert found.sd == pytest.approx((values[0] - values[1]).std(ddof=1)) == found.own[0]
    assert found.agreeing[0] == found.seeds[0] == 4


def test_noise_is_the_residual_of_a_randomised_block_design():
    values = np.random.default_rng(0).standard_normal((5, 4)) + np.arange(4)
    found = blocked_differences(values, [(1, 0), (2, 0), (4, 3)])
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    variance = np.square(rest).sum() / (4 * 3)
    assert found.freedom == 12
    assert found.sd == pytest.approx(np.sqrt(2 * variance))
    reach = stats.t.ppf(1 - 0.05 / 2 / 3, 12) * np.sqrt(2 * variance / 4)
    np.testing.assert_allclose(found.mean, values.mean(1)[[1, 2, 4]] - values.mean(1)[[0, 0, 3]])
    np.testing.assert_allclose(found.high - found.mean, reach)
    np.testing.assert_allclose(found.mean - found.low, reach)


def test_missing_runs():
    values = np.random.default_rng(1).standard_normal((4, 3))
    values[1, 2] = values[3] = np.nan
    found = blocked_differences(values, [(1, 0), (2, 0), (3, 0)])
    assert found.freedom == 8 - 3 - 3 + 1  # runs, less methods and seeds, which share the mean
    assert found.seeds.tolist() == [2, 3, 0]
    np.testing.assert_allclose(found.mean[0], (values[1] - values[0])[:2].mean())
    assert np.isnan(found.mean[2])
    assert not found.below[2]
    assert not found.above[2]
    wider = (found.high - found.mean)[0] / (found.high - found.mean)[1]
    assert wider == pytest.approx(np.sqrt(3 / 2))


def test_differences_to_a_baseline_alone_give_the_same():
    values = np.random.default_rng(2).standard_normal((6, 3))
    values[2, 1] = np.nan
    found = relative_differences(values[1:] - values[0])
    expected = blocked_differences(values, [(j, 0) for j in range(1, 6)])
    for name in ("mean", "low", "high", "sd", "freedom"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name))


def test_false_decisions_with_a_shared_baseline():
    """Of studies without any effect at most 5 % decide something, and neither side is favoured."""
    rng, studies = np.random.default_rng(3), 1500
    below = above = missed = 0
    for _ in range(studies):
        found = blocked_differences(rng.standard_normal(3) + rng.standard_normal((12, 3)), MANY)
        below, above = below + found.below.any(), above + found.above.any()
        missed += ((found.low > 0) | (found.high < 0)).any()
    assert 0.02 < missed / studies < 0.05
    assert 0.01 < below / studies < 0.03
    assert 0.01 < above / studies < 0.03


def test_a_noisier_baseline_costs_some_of_the_confidence():
    rng, studies = np.random.default_rng(5), 600
    scale = np.array([2.0, *[1.0] * 11])[:, None]
    found = [blocked_differences(scale * rng.standard_normal((12, 3)), MANY) for _ in range(studies)]
    missed = sum(((each.low > 0) | (each.high < 0)).any() for each in found)
    assert missed / studies == pytest.approx(0.13, abs=0.04)  # as documented


def test_a_noisy_method_is_decided_by_all_its_seeds_and_named():
    noise = 0.1 * np.random.default_rng(4).standard_normal((12, 3))
    noise[1] = [-3.0, 0.1, -2.0]
    found = blocked_differences(noise, MANY)
    assert found.high[0] < 0  # the pooled noise is too small for it
    assert not found.below[0]
    assert found.agreeing[0] == 2
    assert found.suspect.tolist() == [True, *[False] * 10]


def test_one_seed_has_no_interval():
    found = blocked_differences(np.array([[0.5], [-0.5]]), [(0, 1)])
    assert found.freedom == 0
    assert np.isneginf(found.low).all()
    assert np.isposinf(found.high).all()
    assert np.isnan(found.own).all()
    assert not found.below.any()
    assert not found.above.any()


def test_rank_correlation():
    rng = np.random.default_rng(1)
    a, b = rng.integers(5, size=(2, 40)).astype(float)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(rank_correlation(a, np.ones(40)))


def test_matrix_correlation_tells_falling_from_none():
    rng = np.random.default_rng(2)
    places = np.arange(12.0)
    distance = np.abs(np.subtract.outer(places, places))
    noise = rng.standard_normal((12, 12))
    rho, p = matrix_correlation(np.exp(-distance / 4), distance, permutations=99)
    assert rho == pytest.approx(-1.0)
    assert p == 0.01
    rho, p = matrix_correlation(noise + noise.T, distance, permutations=99)
    assert abs(rho) < 0.4
    assert p > 0.05
    assert matrix_correlation(distance, distance, permutations=99) == (pytest.approx(1.0), 1.0)
