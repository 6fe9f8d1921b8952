"""Paired differences and rank correlations against textbook values and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diffmtl_fast.study.statistics import matrix_correlation, paired_differences, rank_correlation


def test_one_case_is_a_paired_t_test():
    values = np.array([[0.3, 0.1, 0.6, 0.2]])
    found = paired_differences(values)
    expected = stats.ttest_1samp(values[0], 0.0).confidence_interval(0.95)
    assert (found.low[0], found.high[0]) == pytest.approx((expected.low, expected.high))
    assert found.freedom == 3
    assert found.sd == pytest.approx(values.std(ddof=1))


def test_noise_is_pooled_and_the_intervals_hold_together():
    values = np.array([[1.0, 3.0, np.nan], [0.0, 0.0, 0.0], [np.nan] * 3])
    found = paired_differences(values)
    np.testing.assert_allclose(found.mean, [2.0, 0.0, np.nan])
    assert found.freedom == 3  # 1 + 2
    assert found.sd == pytest.approx(np.sqrt(2.0 / 3))
    reach = stats.t.ppf(1 - 0.05 / 2 / 2, 3) * found.sd / np.sqrt([2, 3])  # two cases have values
    np.testing.assert_allclose(found.high[:2] - found.mean[:2], reach)


def test_coverage_of_the_simultaneous_intervals():
    rng = np.random.default_rng(0)
    truth, seeds = np.array([-0.5, 0.0, 0.4, 1.0]), 3
    covered = []
    for _ in range(2000):
        found = paired_differences(truth[:, None] + 0.3 * rng.standard_normal((4, seeds)))
        covered.append(((found.low <= truth) & (truth <= found.high)).all())
    assert 0.935 < np.mean(covered) < 0.985


def test_one_seed_has_no_interval():
    found = paired_differences(np.array([[0.5], [-0.5]]))
    assert found.freedom == 0
    assert np.isneginf(found.low).all()
    assert np.isposinf(found.high).all()


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
