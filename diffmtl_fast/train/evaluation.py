"""How close drawn pictures come to real ones, in the features of a small classifier of the real ones or of others.

Every figure stands beside the same figure for real held-out pictures, the floor, and for noise, the ceiling.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._errors import UserError, blame
from ..analysis.features import Classifier, precision_recall
from ..analysis.frechet import FrechetDistance
from ..data import ImageData
from ..data.items import Items, read
from .components import Data, build, build_decoder
from .config import IN_MEMORY, Component, Evaluation

Array = NDArray[np.float64]
#: Pictures whose features are taken at a time.
TOGETHER = 64


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
    """

    def __init__(
        self,
        features: Callable[[Tensor], Array],
        real: Array,
        held_out: Array,
        classifier: Classifier | None = None,
        agreement: float | None = None,
    ) -> None:
        self.features, self.real = features, real
        self._held_out, self._classifier, self._agreement = held_out, classifier, agreement
        self._distance = FrechetDistance(real)

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

    def floor(self) -> dict[str, float]:
        """The metrics of the real pictures that were held out."""
        return self._figures(self._held_out, self._agreement)

    def _figures(self, features: Array, agreement: float | None) -> dict[str, float]:
        precision, recall = precision_recall(self.real, features)
        figures = {"frechet_distance": self._distance(features), "precision": precision, "recall": recall}
        if agreement is not None:
            figures["class_agreement"] = agreement
        return {name: round(value, 4) for name, value in figures.items()}


def build_judge(data: Data, config: Evaluation, device: torch.device) -> Judge:
    """The judge of data; real latents are decoded, so that what the autoencoder loses counts for none.

    Args:
        data: the real samples.
        config: names the features.
        device: where a network computes them.

    Raises:
        UserError: the features cannot be computed.
    """
    decode = build_decoder(data, device) or torch.Tensor.cpu
    if config.features.path == "auto":
        images = data.images(IN_MEMORY)
        return judge_by_classifier(
            ImageData(decode(images.train), images.train_labels, decode(images.test), images.test_labels)
        )
    features = build_features(config.features, device)

    def of(items: Items) -> Array:
        """Features of the first samples, without those that cannot be read."""
        return np.concatenate([features(decode(part)) for part in _readable(items, config.num_real)])

    with blame("evaluation.features"):
        return Judge(features, of(data.training), of(data.validation or data.training))


def judge_by_classifier(data: ImageData) -> Judge:
    """A judge in the features of a classifier of the real training images.

    The classifier's seed is fixed, so that runs of all seeds are compared by the same one.
    """
    assert data.train_labels is not None
    assert data.test_labels is not None
    classifier = Classifier(data.train, data.train_labels)
    real, held_out = classifier.features(data.train), classifier.features(data.test)
    return Judge(
        classifier.features, real, held_out, classifier, classifier.agreement(data.test, data.test_labels)
    )


def build_features(config: Component, device: torch.device) -> Callable[[Tensor], Array]:
    """The function from pictures to features that an import path names.

    Raises:
        UserError: it cannot be built; when called, it fails or gives something else than finite [N, D].
    """
    network = build("evaluation.features", config)
    if isinstance(network, nn.Module):
        network = network.eval().to(device)

    @torch.no_grad()
    def features(pictures: Tensor) -> Array:
        with blame("evaluation.features"):
            parts = [network(part.to(device)) for part in pictures.split(TOGETHER)]
            found = torch.cat([torch.as_tensor(part).detach().cpu().double() for part in parts])
        if found.shape[:1] != pictures.shape[:1] or found.dim() != 2 or not found.isfinite().all():
            raise UserError(
                f"evaluation.features: expected finite features [{len(pictures)}, D], found {list(found.shape)}"
                f"{'' if found.isfinite().all() else ' with NaN or infinity'}"
            )
        return found.numpy()

    return features


def _readable(items: Items, limit: int) -> Iterator[Tensor]:
    """The first samples of a source that can be read, float32 [n, C, H, W] each."""
    samples = (read(items, index, None, {}) for index in range(len(items)))
    found = itertools.islice((sample[0] for sample in samples if sample is not None), limit)
    while part := [*itertools.islice(found, TOGETHER)]:
        yield torch.stack(part)


def evaluate(judge: Judge, pictures: Tensor, labels: Tensor | None, seed: int) -> dict[str, Any]:
    """Compare pictures with real ones.

    Args:
        judge: knows the real ones.
        pictures: float32 [N, C, H, W] in [-1, 1], N > 3.
        labels: int64 [N], the classes that the pictures were drawn for; None for data without.
        seed: of the noise of the ceiling.

    Returns:
        ``samples``, ``floor`` (real held-out pictures) and ``ceiling`` (Gaussian noise), each with the figures of
        a `Judge`.
    """
    noise = np.random.default_rng(seed).standard_normal(pictures.shape).clip(-1.0, 1.0)
    return {
        "samples": judge.figures(pictures, labels),
        "floor": judge.floor(),
        "ceiling": judge.figures(Tensor(noise), labels),
    }


def table(metrics: Mapping[str, Any]) -> str:
    """The metrics of :func:`evaluate` as lines of text."""
    kinds = ("samples", "floor", "ceiling")
    lines = [f"{'':18}" + "".join(f"{kind:>10}" for kind in kinds)]
    for name in metrics["samples"]:
        values = "".join(f"{metrics[kind][name]:10.4f}" for kind in kinds)
        lines.append(f"{name.replace('_', ' '):18}{values}")
    return "\n".join(lines)
