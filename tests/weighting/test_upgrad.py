"""UPGrad against projections of the gradients themselves: by non-negative least squares, and by active sets."""

from __future__ import annotations

import itertools

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


def active_set_projected(rows, vector):
    """The same by its definition: of all sets of active constraints, one that meets the KKT conditions."""
    units = rows / rows.norm(dim=1, keepdim=True)
    unit, found = vector / vector.norm(), []
    for active in itertools.product((False, True), repeat=len(rows)):
        chosen = units[torch.tensor(active)]
        pull = torch.linalg.pinv(chosen @ chosen.T, rtol=1e-10) @ (chosen @ -unit)
        direction = unit + pull @ chosen
        violation = torch.cat([-pull, -(units @ direction), (chosen @ direction).abs()])
        found.append((violation.amax(), direction))
    violation, direction = min(found, key=lambda pair: pair[0])
    assert violation <= 1e-9
    return direction * vector.norm()


def test_upgrad_meets_the_kkt_conditions(jacobians):
    for rows in jacobians(("ordinary", "duplicated", "opposed"), number=36):
        if len(rows) > 5:
            continue
        found = dm.UPGrad()(rows @ rows.T) @ rows / len(rows)
        expected = torch.stack([active_set_projected(rows, row) for row in rows]).mean(0)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * rows.norm().item())


def test_upgrad_without_conflicts_is_ordinary_training():
    rows = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dm.UPGrad()(rows @ rows.T), torch.ones(5))
