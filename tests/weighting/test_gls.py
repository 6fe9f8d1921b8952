"""GLS: the geometric mean of the present losses."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm


@pytest.mark.parametrize("absent", [[], [1], [0, 2]])
def test_gls_is_the_geometric_mean(absent, device):
    present = torch.ones(4, dtype=torch.bool, device=device)
    present[absent] = False
    losses = torch.tensor([0.5, 2.0, 1.5, 4.0], device=device, dtype=torch.float64, requires_grad=True)
    kept = losses[present]
    expected = kept.prod() ** (1 / len(kept))
    found = dm.GLS()(losses, present)
    torch.testing.assert_close(found, expected)
    (slopes,) = torch.autograd.grad(found, losses)
    torch.testing.assert_close(slopes, torch.autograd.grad(expected, losses)[0])
    weights = slopes * len(kept)
    torch.testing.assert_close(weights[present], expected / kept)


def test_gls_of_many_small_losses_does_not_underflow():
    losses = torch.full((64,), 1e-20)
    assert float(dm.GLS()(losses)) == pytest.approx(1e-20, rel=1e-4)
