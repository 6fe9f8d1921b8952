"""The averaged weights, against the recursion written out."""

from __future__ import annotations

import torch
from torch import nn

from diffmtl_fast.train.ema import Ema


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
