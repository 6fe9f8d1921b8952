"""DWA: the published weights when a window is an epoch, windows of each cluster's own, refusals."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm

K = 4


def shares(weighting, losses, present=None):
    losses = losses.clone().requires_grad_()
    scalar = weighting(losses, present)
    (slopes,) = torch.autograd.grad(scalar, losses)
    torch.testing.assert_close(scalar.detach(), (slopes * losses).sum().detach())
    return slopes


def test_dwa_has_the_published_weights_when_a_window_is_an_epoch(device):
    epochs, steps, temperature = 5, 3, 1.5
    losses = torch.rand(epochs, steps, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        device
    )
    means = losses.mean(1)
    weighting = dm.DWA(K, window=steps, temperature=temperature).to(device).double()
    for epoch in range(epochs):
        ratio = torch.ones_like(means[0]) if epoch < 2 else means[epoch - 1] / means[epoch - 2]
        powers = (ratio / temperature).exp()
        for step in range(steps):
            found = shares(weighting, losses[epoch, step])
            torch.testing.assert_close(found * K, K * powers / powers.sum())


def test_dwa_s_window_of_a_cluster_counts_the_steps_that_have_it():
    weighting, alone = dm.DWA(2, window=2).double(), dm.DWA(1, window=2).double()
    values = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for index, value in enumerate(values):
        shares(alone, value[None])
        shares(weighting, torch.stack([value, value]))
        for _ in range(index % 3):  # steps that have the second cluster alone
            shares(weighting, torch.tensor([9.0, 1.0]).double(), torch.tensor([False, True]))
    assert weighting.ratio[0] == alone.ratio[0] != 1
    assert weighting.ratio[1] != alone.ratio[0]


def test_dwa_refuses():
    for arguments in ({"num_clusters": 0}, {"num_clusters": 2, "window": 0}):
        with pytest.raises(ValueError, match="expected num_clusters and window of at least 1"):
            dm.DWA(**arguments)
    with pytest.raises(ValueError, match="temperature: expected a positive number, found 0"):
        dm.DWA(2, temperature=0)
    with pytest.raises(ValueError, match=r"\[3\], found \[4\]"):
        dm.DWA(3)(torch.zeros(4))
