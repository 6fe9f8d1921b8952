"""The Fréchet distance of distributions for which it is known."""

from __future__ import annotations

import numpy as np
import pytest

from diffmtl_fast.analysis.frechet import FrechetDistance


def _with_moments(rng, count, mean, covariance):
    """A sample whose mean and covariance are exactly the given ones."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_commuting_gaussians():
    # For covariances with common eigenvectors: |Δμ|² + Σ (√λ_a - √λ_b)².
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    a = _with_moments(rng, 50, np.zeros(3), q @ np.diag([1.0, 4.0, 9.0]) @ q.T)
    b = _with_moments(rng, 80, np.array([1.0, 2.0, 2.0]), q @ np.diag([4.0, 4.0, 0.25]) @ q.T)
    assert FrechetDistance(a)(b) == pytest.approx(9.0 + 1.0 + 0.0 + 6.25, rel=1e-9)
    assert FrechetDistance(b)(a) == pytest.approx(16.25, rel=1e-9)


def test_frechet_distance_in_general_position_is_that_of_the_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((30, 5)) + 1.0
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert FrechetDistance(a)(b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_a_singular_covariance():
    rng = np.random.default_rng(2)
    a = rng.standard_normal((20, 4))
    a[:, 3] = 0.0  # a dead feature
    assert FrechetDistance(a)(a) == pytest.approx(0.0, abs=1e-9)


def test_a_single_feature():
    # |Δμ|² + (σ_a - σ_b)²
    assert FrechetDistance(np.array([[-1.0], [0.0], [1.0]]))(
        np.array([[3.0], [5.0], [7.0]])
    ) == pytest.approx(26.0)
