"""IMTL-L: the published sum, masks, what is learned."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm


@pytest.mark.parametrize("absent", [[], [1], [0, 2]])
def test_imtl_l_is_the_mean_of_the_published_terms(absent, device):
    present = torch.ones(4, dtype=torch.bool, device=device)
    present[absent] = False
    weighting = dm.IMTLL(4).to(device).double()
    scales = torch.tensor([0.3, -1.0, 0.0, 2.0], device=device, dtype=torch.float64, requires_grad=True)
    weighting.log_scale.data.copy_(scales.detach())
    losses = torch.tensor([0.5, 2.0, 1.0, 4.0], device=device, dtype=torch.float64, requires_grad=True)
    found = weighting(losses, present)
    expected = sum(scales[k].exp() * losses[k] - scales[k] for k in range(4) if present[k]) / present.sum()
    torch.testing.assert_close(found, expected)
    slopes = torch.autograd.grad(found, [losses, weighting.log_scale])
    torch.testing.assert_close(slopes, torch.autograd.grad(expected, [losses, scales]))
    assert slopes[1][absent].abs().sum() == 0


def test_imtl_l_starts_as_ordinary_training_and_brings_every_loss_to_one():
    weighting, losses = dm.IMTLL(3), torch.tensor([0.3, 3.0, 9.0])
    assert weighting(losses) == losses.mean()
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_scale.detach().exp() * losses, torch.ones(3), rtol=0, atol=1e-2)


def test_imtl_l_refuses():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        dm.IMTLL(0)
    with pytest.raises(ValueError, match=r"\[3\], found \[4\]"):
        dm.IMTLL(3)(torch.zeros(4))
