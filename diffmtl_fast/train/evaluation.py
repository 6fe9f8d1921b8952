"""How close drawn pictures come to real ones, in the features of a small classifier of the real ones.

Every figure stands beside the same figure for real test images, the floor, and for noise, the ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._extras import require
from ..analysis.frechet import FrechetDistance
from .config import NEIGHBOURS
from .data import ImageData

Array = NDArray[np.float64]

HIDDEN_LAYERS = (128, 64)


class Classifier:
    """A multi-layer perceptron on pixels, trained on real images; its last hidden layer gives the features.

    Args:
        images: float32 [N, C, H, W].
        labels: int64 [N].
        seed: of its initial weights and data order.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int = 0) -> None:
        networks = require("sklearn.neural_network", "train")
        self._net = networks.MLPClassifier(HIDDEN_LAYERS, max_iter=300, random_state=seed)
        # Its matrices are small: threads would only wait, and their number would change the last bits.
        with require("threadpoolctl", "train").threadpool_limits(1):
            self._net.fit(_flat(images), labels.numpy())

    def features(self, images: Tensor) -> Array:
        """Activations of the last hidden layer, [N, 64]."""
        x = _flat(images)
        for weight, bias in list(zip(self._net.coefs_, self._net.intercepts_, strict=True))[:-1]:
            x = np.maximum(x @ weight + bias, 0.0)
        return x

    def agreement(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of images that it takes for their class."""
        return float((self._net.predict(_flat(images)) == labels.numpy()).mean())


def precision_recall(real: Array, drawn: Array, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Fraction of drawn pictures among the real ones, and of real ones among the drawn.

    A point lies among a set if it is no farther from one of its points than that point's k-th neighbour.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
    NeurIPS 2019.

    Args:
        real: [N, D] with N > k.
        drawn: [M, D] with M > k.
        k: neighbours that a point's sphere reaches.
    """
    return _covered(real, drawn, k), _covered(drawn, real, k)


class Judge:
    """Compares pictures with the real training images, in the features of a classifier of them.

    The classifier's seed is fixed, so that runs of all seeds are compared by the same one.

    Args:
        data: real images with labels.

    Attributes:
        real: float64 [N, 64], the features of the training images.
    """

    def __init__(self, data: ImageData) -> None:
        assert data.train_labels is not None
        self._data = data
        self._classifier = Classifier(data.train, data.train_labels)
        self.real = self.features(data.train)
        self._distance = FrechetDistance(self.real)

    def features(self, images: Tensor) -> Array:
        """Features of pictures, float64 [N, 64]."""
        return self._classifier.features(images)

    def figures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """The metrics of pictures.

        Args:
            images: float32 [N, C, H, W] in [-1, 1], N > 3.
            labels: int64 [N], the classes that they were drawn for.

        Returns:
            ``frechet_distance``, ``precision``, ``recall`` and ``class_agreement``.
        """
        features = self.features(images)
        precision, recall = precision_recall(self.real, features)
        figures = {
            "frechet_distance": self._distance(features),
            "precision": precision,
            "recall": recall,
            "class_agreement": self._classifier.agreement(images, labels),
        }
        return {name: round(value, 4) for name, value in figures.items()}

    def floor(self) -> dict[str, float]:
        """The metrics of the real test images."""
        assert self._data.test_labels is not None
        return self.figures(self._data.test, self._data.test_labels)

    def ceiling(self, labels: Tensor, seed: int) -> dict[str, float]:
        """The metrics of Gaussian noise."""
        shape = (len(labels), *self._data.shape)
        noise = np.random.default_rng(seed).standard_normal(shape).clip(-1.0, 1.0)
        return self.figures(Tensor(noise), labels)


def evaluate(data: ImageData, pictures: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """Compare pictures with the data.

    Args:
        data: real images with labels.
        pictures: float32 [N, C, H, W] in [-1, 1], N > 3.
        labels: int64 [N], the classes that the pictures were drawn for.
        seed: of the noise of the ceiling.

    Returns:
        ``samples``, ``floor`` (real test images) and ``ceiling`` (Gaussian noise), each with the figures of a
        `Judge`.
    """
    judge = Judge(data)
    return {
        "samples": judge.figures(pictures, labels),
        "floor": judge.floor(),
        "ceiling": judge.ceiling(labels, seed),
    }


def table(metrics: Mapping[str, Any]) -> str:
    """The metrics of :func:`evaluate` as lines of text."""
    kinds = ("samples", "floor", "ceiling")
    lines = [f"{'':18}" + "".join(f"{kind:>10}" for kind in kinds)]
    for name in metrics["samples"]:
        values = "".join(f"{metrics[kind][name]:10.4f}" for kind in kinds)
        lines.append(f"{name.replace('_', ' '):18}{values}")
    return "\n".join(lines)


def _covered(support: Array, points: Array, k: int) -> float:
    distances = _distances(support, support)
    radii = np.sort(distances, axis=1)[:, k]  # column 0 is the point itself
    return float((_distances(points, support) <= radii).any(axis=1).mean())


def _distances(a: Array, b: Array) -> Array:
    return require("scipy.spatial.distance", "train").cdist(a, b)


def _flat(images: Tensor) -> Array:
    return images.flatten(1).double().numpy()
