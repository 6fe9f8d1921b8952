"""Metrics on distributions whose values are known."""

from __future__ import annotations

import numpy as np
import pytest

from diffmtl_fast.train.data import digits
from diffmtl_fast.train.evaluation import Classifier, evaluate, frechet_distance, precision_recall


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
    assert frechet_distance(a, b) == pytest.approx(9.0 + 1.0 + 0.0 + 6.25, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(16.25, rel=1e-9)


def test_frechet_distance_in_general_position_is_that_of_the_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((30, 5)) + 1.0
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_a_singular_covariance():
    rng = np.random.default_rng(2)
    a = rng.standard_normal((20, 4))
    a[:, 3] = 0.0  # a dead feature
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_precision_and_recall():
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((60, 2)), rng.standard_normal((60, 2)) + 100.0
    assert precision_recall(left, left) == (1.0, 1.0)
    assert precision_recall(left, right) == (0.0, 0.0)
    # One of two modes drawn: everything drawn is real, half of what is real is drawn.
    assert precision_recall(np.concatenate([left, right]), left) == (1.0, 0.5)
    assert precision_recall(left, np.concatenate([left, right])) == (0.5, 1.0)


def test_precision_of_points_on_a_line():
    # Radius of the 1st neighbour is 1 at 0, 1, 2 and 8 at 10: the reach is [-1, 3] and [2, 18].
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    drawn = np.array([[-1.5], [-0.5], [2.9], [17.0], [19.0]])
    assert precision_recall(real, drawn, k=1)[0] == pytest.approx(3 / 5)


@pytest.fixture(scope="module")
def data():
    return digits()


def test_classifier_knows_the_digits(data):
    classifier = Classifier(data.train, data.train_labels)
    assert classifier.agreement(data.test, data.test_labels) > 0.95
    features = classifier.features(data.test)
    assert features.shape == (360, 64)
    # The output layer on these features is the classifier itself.
    logits = features @ classifier._net.coefs_[-1] + classifier._net.intercepts_[-1]
    assert np.array_equal(logits.argmax(1), classifier._net.predict(data.test.flatten(1).numpy()))


def test_real_images_meet_the_floor_and_noise_the_ceiling(data):
    figures = evaluate(data, data.test, data.test_labels, seed=0)
    assert figures["samples"] == figures["floor"]
    assert figures["floor"]["frechet_distance"] < 2.0
    assert figures["floor"]["precision"] > 0.85
    assert figures["ceiling"]["frechet_distance"] > 50 * figures["floor"]["frechet_distance"]
    assert figures["ceiling"]["precision"] == 0.0
    assert figures["ceiling"]["class_agreement"] < 0.3
