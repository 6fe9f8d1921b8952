"""Cosines and conflicts of cluster gradients, from their Gramian."""

from __future__ import annotations

import math

import torch
from torch import nn

import diffmtl_fast as dm
from diffmtl_fast.gradients.diagnostics import conflicts, cosines


def test_cosines_of_a_gramian(device):
    jacobian = torch.tensor([[3.0, 4.0], [-4.0, 3.0], [-3.0, -4.0], [0.0, 0.0]], device=device)
    found = cosines(jacobian @ jacobian.T)
    expected = torch.tensor([[1.0, 0, -1], [0, 1, 0], [-1, 0, 1]], device=device)
    torch.testing.assert_close(found[:3, :3], expected)
    assert found[3].isnan().all()
    assert found[:, 3].isnan().all()


def test_conflicts_count_the_pairs_that_there_are(device):
    nan = math.nan
    matrices = [
        [[1, -0.1, 0.2], [-0.1, 1, -0.9], [0.2, -0.9, 1]],
        [[1, nan, -0.2], [nan, nan, nan], [-0.2, nan, 1]],
        [[1, nan, nan], [nan, nan, nan], [nan, nan, nan]],
    ]
    found = conflicts(torch.tensor(matrices, device=device))
    torch.testing.assert_close(found, torch.tensor([2 / 3, 1.0, nan], device=device), equal_nan=True)


def test_the_last_step_tells_its_conflicts(device):
    model = nn.Linear(2, 1, bias=False).to(device)
    torch.nn.init.zeros_(model.weight)
    mtl = dm.ClusteredMTL(model, 4, dm.PCGrad())
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]], device=device)
    out = mtl(x, cluster=torch.tensor([0, 1, 3], device=device))
    mtl.backward((out - 1).square().flatten())  # gradients -2 x
    expected = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 1]], device=device)
    kept = mtl.last.cosines.float()[[0, 1, 3]][:, [0, 1, 3]]
    torch.testing.assert_close(kept, expected)
    assert mtl.last.cosines[2].isnan().all()
    torch.testing.assert_close(mtl.last.conflicts, torch.tensor(1 / 3, device=device))

    plain = dm.ClusteredMTL(model, 4, dm.UncertaintyWeighting(4).to(device))
    plain.backward((plain(x, cluster=torch.tensor([0, 1, 3], device=device)) - 1).square().flatten())
    assert plain.last.cosines is None
    assert plain.last.conflicts is None
