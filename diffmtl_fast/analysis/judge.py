"""How close drawn pictures come to real ones in some features: Fréchet distance, precision and recall.

Every figure stands beside the same figure for real held-out pictures, the floor, and for noise, the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .features import NEIGHBOURS, Classifier, precision_recall
from .frechet import FrechetDistance

Array = NDArray[np.float64]


class Judge:
    """Compares pictures with real ones.

    Args:
        features: of pictures float32 [N, C, H, W] in [-1, 1], float64 [N, D].
        real: [N, D], the features of the training pictures.
        held_out: [M, D], those of real pictures that were held out, for the floor.
        classifier: of the real pictures, which tells the class of drawn ones too; None for none.
        agreement: share of the held-out pictures that the classifier takes for their class.

    Attributes:
        features: as given.
        real: as given.

    Raises:
        ValueError: too few real pictures for their nearest neighbours.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Array],
        real: Array,
        held_out: Array,
        classifier: Classifier | None = None,
        agreement: float | None = None,
    ) -> None:
        for kind, found in (("real", real), ("held-out real", held_out)):
            if len(found) <= NEIGHBOURS:
                raise ValueError(f"expected more than {NEIGHBOURS} {kind} pictures, found {len(found)}")
        self.features, self.real = features, real
        self._held_out, self._classifier, self._agreement = held_out, classifier, agreement
        self._distance = FrechetDistance(real)

    @classmethod
    def by_classifier(cls, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Judge:
        """A judge in the features of a classifier of real pictures.

        The classifier's seed is fixed, so that runs of all seeds are compared by the same one.

        Args:
            train: real pictures, float32 [N, C, H, W] in [-1, 1].
            train_labels: their classes, int64 [N].
            test: real pictures that were held out.
            test_labels: their classes.

        Raises:
            ValueError: too few pictures.
        """
        classifier = Classifier(train, train_labels)
        real, held_out = classifier.features(train), classifier.features(test)
        return cls(classifier.features, real, held_out, classifier, classifier.agreement(test, test_labels))

    def figures(self, pictures: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """The metrics of pictures.

        Args:
            pictures: float32 [N, C, H, W] in [-1, 1], N > 3.
            labels: int64 [N], the classes that they were drawn for; None for data without.

        Returns:
            ``frechet_distance``, ``precision``, ``recall`` and, by a classifier, ``class_agreement``.
        """
        agreement = None
        if self._classifier is not None and labels is not None:
            agreement = self._classifier.agreement(pictures, labels)
        return self._figures(self.features(pictures), agreement)

    def evaluate(self, pictures: Tensor, labels: Tensor | None, seed: int) -> dict[str, Any]:
        """Compare pictures with real ones.

        Args:
            pictures: see `figures`, as for the next one.
            labels: see there.
            seed: of the noise of the ceiling.

        Returns:
            ``samples``, ``floor`` (real held-out pictures) and ``ceiling`` (Gaussian noise), each with the
            `figures`.
        """
        noise = np.random.default_rng(seed).standard_normal(pictures.shape).clip(-1.0, 1.0)
        return {
            "samples": self.figures(pictures, labels),
            "floor": self._figures(self._held_out, self._agreement),
            "ceiling": self.figures(Tensor(noise), labels),
        }

    def _figures(self, features: Array, agreement: float | None) -> dict[str, float]:
        precision, recall = precision_recall(self.real, features)
        figures = {"frechet_distance": self._distance(features), "precision": precision, "recall": recall}
        if agreement is not None:
            figures["class_agreement"] = agreement
        return {name: round(value, 4) for name, value in figures.items()}
