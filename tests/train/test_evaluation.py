"""Metrics on distributions whose values are known."""

from __future__ import annotations

import numpy as np
import pytest

from diffmtl_fast.analysis.features import Classifier, precision_recall
from diffmtl_fast.train.data import digits
from diffmtl_fast.train.evaluation import evaluate


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
