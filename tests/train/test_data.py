"""The digits and the order of visits."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast.train.data import EpochSampler, ImageData, digits


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


def test_sampler_visits_every_image_once_an_epoch(generator):
    sampler = EpochSampler(10, generator)
    visits = torch.cat([sampler.next(4) for _ in range(10)]).cpu()
    epochs = visits.view(4, 10)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(10).expand(4, 10))
    assert not torch.equal(epochs[0], epochs[1])


def test_sampler_gives_batches_larger_than_the_data(generator):
    assert EpochSampler(3, generator).next(8).cpu().bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_sampler_continues_from_its_state(device):
    sampler = EpochSampler(10, torch.Generator(device).manual_seed(0))
    sampler.next(7)
    state, random = sampler.state_dict(), sampler.generator.get_state()
    expected = [sampler.next(7) for _ in range(3)]
    other = EpochSampler(10, torch.Generator(device))
    other.load_state_dict(state)
    other.generator.set_state(random)
    assert all(torch.equal(other.next(7), part) for part in expected)
