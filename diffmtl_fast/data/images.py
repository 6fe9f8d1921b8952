"""Images in memory, and the embedded digits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._extras import require
from .items import Items, Memory


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
