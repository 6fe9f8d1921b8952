"""Images in memory, and the embedded digits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras import require
from .items import Items, Memory

#: Of a value of a training image; resizing and encoders overshoot 1 a little.
LARGEST = 2.0


@dataclass(frozen=True)
class ImageData:
    """Training and test images with optional classes.

    Attributes:
        train: float32 [N, C, H, W], scaled to [-1, 1].
        train_labels: int64 [N] classes 0 ... C-1, or None.
        test: float32 [M, C, H, W].
        test_labels: int64 [M], or None.
    """

    train: Tensor
    train_labels: Tensor | None
    test: Tensor
    test_labels: Tensor | None

    def __post_init__(self) -> None:
        for name, images, labels in (
            ("train", self.train, self.train_labels),
            ("test", self.test, self.test_labels),
        ):
            if images.ndim != 4 or images.dtype != torch.float32 or len(images) == 0:
                raise ValueError(
                    f"{name}: expected float32 [N, C, H, W] with N >= 1, "
                    f"found {images.dtype} {list(images.shape)}"
                )
            if not torch.isfinite(images).all():
                raise ValueError(f"{name}: expected finite values, found NaN or infinity")
            if labels is None:
                continue
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{name}_labels: expected int64 [{len(images)}], found {labels.dtype} {list(labels.shape)}"
                )
            if int(labels.min()) < 0:
                raise ValueError(f"{name}_labels: expected classes >= 0, found {int(labels.min())}")
        if self.test.shape[1:] != self.train.shape[1:]:
            raise ValueError(
                f"test: expected images of the shape of the training ones {list(self.train.shape[1:])}, found "
                f"{list(self.test.shape[1:])}"
            )

    def check(self) -> None:
        """Refuse images that are not scaled to [-1, 1], and labels that leave out a class.

        Latents and the first samples of a source may be such, so it is not part of the construction.

        Raises:
            ValueError: they are.
        """
        low, high = (float(value) for value in self.train.aminmax())
        if low < -LARGEST or high > LARGEST:
            raise ValueError(
                f"train: expected values scaled to [-1, 1], found {low:.4g} to {high:.4g}; "
                "ImageData.scaled(...) scales images of 0 to 255"
            )
        if self.train_labels is not None:
            found = torch.bincount(self.train_labels)
            absent = (found == 0).nonzero().flatten().tolist()
            if absent:
                raise ValueError(
                    f"train_labels: expected every class 0 ... {len(found) - 1}, found no image of {absent[:10]}"
                )
            if self.test_labels is not None and int(self.test_labels.max()) >= len(found):
                raise ValueError(
                    f"test_labels: expected the classes of the training images, 0 ... {len(found) - 1}, found "
                    f"{int(self.test_labels.max())}"
                )

    @classmethod
    def scaled(
        cls, train: Tensor, train_labels: Tensor | None, test: Tensor, test_labels: Tensor | None
    ) -> ImageData:
        """Make it of images whose values are 0 to 255: uint8 or floating point, [N, C, H, W]."""
        return cls(train.float() / 127.5 - 1, train_labels, test.float() / 127.5 - 1, test_labels)

    def fingerprint(self) -> dict[str, Any]:
        """Count, shape and SHA-256 of the training images and labels."""
        digest = hashlib.sha256()
        for part in (self.train, self.train_labels):
            if part is not None:
                digest.update(part.contiguous().numpy().data)
        return {"count": len(self.train), "shape": list(self.shape), "sha256": digest.hexdigest()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def training(self) -> Items:
        """The training images as `diffmtl_fast.data.Items`."""
        return Memory(self.train, self.train_labels)

    @property
    def validation(self) -> Items | None:
        """The test images likewise."""
        return Memory(self.test, self.test_labels)

    def images(self, limit: int) -> ImageData:
        """Itself: it is in memory as it is."""
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        return 0 if self.train_labels is None else int(self.train_labels.max()) + 1


def digits(test_size: int = 360, seed: int = 0) -> ImageData:
    """scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, embedded in the package.

    Args:
        test_size: images kept for the test set, drawn in equal proportions from every class.
        seed: of the split.
    """
    datasets = require("sklearn.datasets", "train")
    selection = require("sklearn.model_selection", "train")
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test, train_labels, test_labels = selection.train_test_split(
        images, labels.astype(np.int64), test_size=test_size, stratify=labels, random_state=seed
    )
    return ImageData(*(torch.from_numpy(part) for part in (train, train_labels, test, test_labels)))
