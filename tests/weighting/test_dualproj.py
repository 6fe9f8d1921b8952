"""DualProj against the projection by non-negative least squares on the gradients themselves."""

from __future__ import annotations

import torch
from scipy.optimize import nnls

import diffmtl_fast as dm


def test_dualproj_is_the_projected_mean(jacobians):
    for rows in jacobians():
        rows = rows / rows.norm(dim=1).amax()
        units, mean = rows / rows.norm(dim=1, keepdim=True), rows.mean(0)
        expected = mean + torch.from_numpy(nnls(units.T.numpy(), -mean.numpy(), maxiter=1000)[0]) @ units
        found = dm.DualProj()(rows @ rows.T) @ rows / len(rows)
        assert (found - expected).norm() <= 3e-7


def test_dualproj_is_ordinary_training_where_the_mean_harms_none():
    rows = torch.tensor([[1.0, 0.5], [-0.8, 1.0]])  # they conflict, but neither with their mean
    assert torch.equal(dm.DualProj()(rows @ rows.T), torch.ones(2))
    assert not torch.equal(dm.UPGrad()(rows @ rows.T), torch.ones(2))
