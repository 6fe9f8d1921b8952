"""How close drawn pictures come to real ones, in the features of a small classifier of the real ones.

Every figure stands beside the same figure for real test images, the floor, and for noise, the ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..analysis.features import Classifier, precision_recall
from ..analysis.frechet import FrechetDistance
from ..data import ImageData

Array = NDArray[np.float64]


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
