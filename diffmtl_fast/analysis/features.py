"""Features of a small classifier of real images, and precision and recall in any features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._extras import require

Array = NDArray[np.float64]

HIDDEN_LAYERS = (128, 64)
# Of the k-nearest-neighbour precision and recall.
NEIGHBOURS = 3
ROWS = 1024  # of a matrix of distances that is in memory


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


def _covered(support: Array, points: Array, k: int) -> float:
    # Column 0 is the point itself.
    radii = np.concatenate([np.partition(part, k, axis=1)[:, k] for part in _distances(support, support)])
    among = [(part <= radii).any(axis=1) for part in _distances(points, support)]
    return float(np.concatenate(among).mean())


def _distances(a: Array, b: Array) -> Iterator[Array]:
    """Distances of points of the one set, some at a time, to all of the other."""
    cdist = require("scipy.spatial.distance", "train").cdist
    return (cdist(a[start : start + ROWS], b) for start in range(0, len(a), ROWS))


def _flat(images: Tensor) -> Array:
    return images.flatten(1).double().numpy()
