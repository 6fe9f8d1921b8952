"""The averaged weights, against the recursion written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffmtl_fast.train.ema import Ema, exponent


def test_follows_with_a_decay_that_warms_up(device):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(device)
    ema = Ema(model, decay=0.3)
    expected = model[0].weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            model[0].weight.add_(1.0 + step)
            model[1].running_mean.add_(1.0)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        ema.update(model)
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_width_of_a_power_function(sigma_rel):
    """The standard deviation of p(τ) = (γ + 1) τ^γ on [0, 1], by its moments."""
    gamma = exponent(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.3])
def test_widths_that_no_power_function_has(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel: expected more than 0 and less than 0\.2887"):
        exponent(sigma_rel)
