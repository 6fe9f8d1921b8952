"""A loss that a GradScaler has scaled is refused: weights are those of unscaled gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import diffmtl_fast as dm


def losses(weighting):
    mtl = dm.ClusteredMTL(nn.Linear(3, 3), 2, weighting)
    return mtl, mtl(torch.randn(4, 3), cluster=torch.tensor([0, 0, 1, 1])).square().mean(1)


@pytest.mark.parametrize("weighting", [dm.PCGrad, dm.Equal])
@pytest.mark.parametrize("divide", [1, 2])
def test_scaled_losses_are_refused(weighting, divide):
    mtl, loss = losses(weighting())
    scaler = torch.amp.GradScaler("cpu")
    scaled = scaler.scale(loss) / divide
    with pytest.raises(ValueError, match=r"write mtl.backward\(loss, scaler=scaler\)"):
        mtl.backward(scaled)


def test_other_factors_are_not():
    mtl, loss = losses(dm.PCGrad())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    mtl.backward(scaler.scale(loss) * torch.tensor(2.0))
