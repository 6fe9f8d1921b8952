"""STCH: the published definition after the warm-up, its limits, clusters that come later."""

from __future__ import annotations

import math

import pytest
import torch

import diffmtl_fast as dm

LOSSES = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def slopes(weighting, losses, present=None):
    losses = losses.clone().requires_grad_()
    scalar = weighting(losses, present)
    return scalar.detach(), torch.autograd.grad(scalar, losses)[0]


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_stch_is_the_published_definition_after_its_warm_up(mu, device):
    history = torch.rand(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    weighting = dm.STCH(3, mu=mu, warmup=10).to(device).double()
    for losses in history:
        found, weights = slopes(weighting, losses)
        assert float(found) == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(weights, 1 / (3 * losses))  # of Σ log L / n
    reference = history[8:].mean(0)
    torch.testing.assert_close(weighting.reference, reference)
    losses = LOSSES.to(device).requires_grad_()
    expected = mu * (sum(((losses[k] / reference[k]).log() / mu).exp() for k in range(3)) / 3).log()
    found, weights = slopes(weighting, losses.detach())
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(weights, torch.autograd.grad(expected, losses)[0])
    torch.testing.assert_close(weighting.reference, reference)  # fixed from now on


def ready(mu, reference):
    weighting = dm.STCH(3, mu=mu, warmup=1).double()
    weighting(reference)
    return weighting


def test_stch_goes_from_the_largest_relative_loss_to_all_losses_alike():
    reference = torch.tensor([1.0, 2.0, 0.1], dtype=torch.float64)
    found, weights = slopes(ready(1e-3, reference), LOSSES)
    assert float(found) == pytest.approx(math.log(1.0 / 0.1), abs=2e-3)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 1.0]).double())
    _, weights = slopes(ready(1e9, reference), LOSSES)
    torch.testing.assert_close(weights, 1 / (3 * LOSSES))


def test_a_cluster_that_comes_later_warms_up_by_itself():
    weighting = ready(1.0, LOSSES)
    weighting.count[1], weighting.reference[1] = 0, 0
    present = torch.tensor([True, False, True])
    _, before = slopes(weighting, 2 * LOSSES, present)
    _, alone = slopes(ready(1.0, LOSSES), 2 * LOSSES, present)
    torch.testing.assert_close(before, alone)
    _, weights = slopes(weighting, 2 * LOSSES)  # the second's log ratio is 0, those of the others log 2
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0, 2.0]) / 5 / (2 * LOSSES))
    assert weighting.reference[1] == 4
    _, weights = slopes(weighting, 2 * LOSSES)
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0, 2.0]) / 5 / (2 * LOSSES))


def test_stch_refuses():
    for arguments in ({"num_clusters": 0}, {"num_clusters": 2, "warmup": 0}):
        with pytest.raises(ValueError, match="expected num_clusters and warmup of at least 1"):
            dm.STCH(**arguments)
    with pytest.raises(ValueError, match="mu: expected a positive number, found 0"):
        dm.STCH(2, mu=0)
    with pytest.raises(ValueError, match="losses: expected at least 0"):
        dm.STCH(2)(torch.tensor([1.0, -1.0]))
