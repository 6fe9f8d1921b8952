"""Scale-invariant losses: the sum of logarithms, whatever the scale of a loss."""

from __future__ import annotations

import math

import pytest
import torch

import diffmtl_fast as dm


def test_si_is_the_mean_of_the_present_logarithms(device):
    losses = torch.tensor([0.5, 2.0, 4.0], device=device, dtype=torch.float64, requires_grad=True)
    found = dm.ScaleInvariant()(losses, torch.tensor([True, False, True], device=device))
    assert found.item() == pytest.approx((math.log(0.5) + math.log(4)) / 2, rel=1e-14)
    found.backward()
    assert losses.grad.tolist() == [1 / (2 * 0.5), 0, 1 / (2 * 4.0)]


def test_si_trains_alike_whatever_the_scale_of_a_loss():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    slopes = []
    for scale in (1.0, 1e-6):
        losses = x.square() * torch.tensor([1.0, scale])
        slopes.append(torch.autograd.grad(dm.ScaleInvariant()(losses), x)[0])
    torch.testing.assert_close(*slopes)


def test_si_has_no_slope_where_a_loss_is_zero():
    losses = torch.tensor([0.0, 2.0], requires_grad=True)
    dm.ScaleInvariant()(losses).backward()
    assert losses.grad.tolist() == [0, 0.25]


def test_si_refuses_negative_losses_but_of_absent_clusters():
    losses = torch.tensor([1.0, -2.0])
    with pytest.raises(ValueError, match=r"losses: expected at least 0 .* found -2\.0"):
        dm.ScaleInvariant()(losses)
    assert dm.ScaleInvariant()(losses, torch.tensor([True, False])) == 0
