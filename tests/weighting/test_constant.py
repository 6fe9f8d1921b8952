"""Constant weights: what is given is what is used."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm


def test_constant_is_the_weighted_mean_of_the_present_losses(device):
    losses = torch.tensor([2.0, 4.0, 8.0], device=device)
    weighting = dm.Constant(3, [1, 0.5, 0.25]).to(device)
    assert weighting(losses).item() == 2
    assert weighting(losses, torch.tensor([True, True, False], device=device)).item() == 2
    assert weighting(losses, torch.tensor([False, False, True], device=device)).item() == 2
    assert dm.Constant(3).to(device)(losses) == dm.Equal()(losses)


def test_constant_refuses():
    for weights in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights: expected 2 finite numbers of at least 0, found"):
            dm.Constant(2, weights)
