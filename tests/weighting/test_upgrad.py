"""UPGrad against projections by non-negative least squares on the gradients themselves, and against TorchJD."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls

import diffmtl_fast as dm


def projected(rows, vector):
    """The vector's projection onto the d with ⟨d, g⟩ ≥ 0 for all rows g."""
    units = rows / rows.norm(dim=1, keepdim=True)
    return vector + torch.from_numpy(nnls(units.T.numpy(), -vector.numpy(), maxiter=1000)[0]) @ units


def test_upgrad_is_the_mean_of_the_projected_gradients(jacobians):
    for rows in jacobians():
        rows = rows / rows.norm(dim=1).amax()
        found = dm.UPGrad()(rows @ rows.T) @ rows / len(rows)
        expected = torch.stack([projected(rows, row) for row in rows]).mean(0)
        assert (found - expected).norm() <= 3e-7


def test_upgrad_is_torchjds(jacobians):
    pytest.importorskip("quadprog")
    module = pytest.importorskip("torchjd.aggregation")
    projector = pytest.importorskip("torchjd.linalg").QuadprogProjector(norm_eps=0, reg_eps=1e-13)
    theirs = module.UPGradWeighting(projector=projector)
    for rows in jacobians(("ordinary", "duplicated"), number=30):
        found = dm.UPGrad()(rows @ rows.T) @ rows / len(rows)
        torch.testing.assert_close(
            found, theirs(rows @ rows.T) @ rows, rtol=1e-6, atol=1e-6 * rows.norm().item()
        )


def test_upgrad_without_conflicts_is_ordinary_training():
    rows = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dm.UPGrad()(rows @ rows.T), torch.ones(5))
