"""Uncertainty weighting: the published sum, masks, what is learned."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm
from benchmarks.reference import uncertainty_weighting as published_uncertainty


@pytest.mark.parametrize("absent", [[], [1], [0, 2]])
def test_uncertainty_weighting_equals_the_published_sum(absent, device):
    present = torch.ones(4, dtype=torch.bool, device=device)
    present[absent] = False
    weighting = dm.UncertaintyWeighting(4).to(device)
    weighting.log_var.data = torch.tensor([0.3, -1.0, 0.0, 2.0], device=device)
    losses = torch.tensor([0.5, 2.0, 1.0, 4.0], device=device, requires_grad=True)
    u, expected_losses = (x.detach().clone().requires_grad_() for x in (weighting.log_var, losses))
    expected = published_uncertainty(expected_losses, u, present)
    found = weighting(losses, present)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(losses.grad, expected_losses.grad)
    torch.testing.assert_close(weighting.log_var.grad, u.grad)
    assert weighting.log_var.grad[absent].abs().sum() == 0


def test_uncertainty_weighting_learns_the_log_losses():
    # The minimum over u_k of ½ (e^{−u} L / K + u) is u = log(L / K).
    weighting, losses = dm.UncertaintyWeighting(3), torch.tensor([0.3, 3.0, 9.0])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_var.detach(), (losses / 3).log(), rtol=0, atol=1e-2)


def test_uncertainty_weighting_refuses():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        dm.UncertaintyWeighting(0)
    with pytest.raises(ValueError, match=r"\[3\], found \[4\]"):
        dm.UncertaintyWeighting(3)(torch.zeros(4))
