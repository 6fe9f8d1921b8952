"""The digits and images in memory."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast.data import ImageData, digits


def test_digits_are_all_there_split_in_proportion():
    data = digits()
    assert data.train.shape == (1437, 1, 8, 8)
    assert data.test.shape == (360, 1, 8, 8)
    assert data.num_classes == 10
    assert float(data.train.min()) == -1.0
    assert float(data.train.max()) == 1.0
    assert (data.test_labels.bincount() - 36).abs().max() <= 1
    assert torch.equal(data.train, digits().train)


def test_image_data_refuses_what_training_cannot_use():
    images, labels = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected float32 \[N, C, H, W\]"):
        ImageData(images.double(), None, images, None)
    with pytest.raises(ValueError, match="finite"):
        ImageData(images / 0, None, images, None)
    with pytest.raises(ValueError, match=r"train_labels: expected int64 \[2\]"):
        ImageData(images, labels[:1], images, labels)
    with pytest.raises(ValueError, match="classes >= 0"):
        ImageData(images, labels - 1, images, labels)
