"""CAGrad against the optimality conditions of its definition, and against TorchJD."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
def test_cagrad_improves_the_worst_cluster_as_much_as_the_ball_allows(c, jacobians):
    """v ≥ 0 weighs only the clusters that improve the least, and |d − g₀| = c |g₀| unless that least is 0."""
    for rows in jacobians():
        rows = rows / rows.norm(dim=1).amax()
        v = (dm.CAGrad(c)(rows @ rows.T) - 1) / len(rows)
        mean = rows.mean(0)
        d = mean + v @ rows
        improvements = rows @ d
        worst = improvements.amin()
        assert (v >= 0).all()
        reached = (d - mean).norm() / (c * mean.norm())
        unit = (c + 1) * mean.norm() * rows.norm(dim=1).amax()
        apart = v / v.sum().clamp(min=1e-9) @ (improvements - worst)  # by how much those weighed improve more
        assert reached <= 1 + 1e-5
        if reached >= 1 - 1e-3:
            assert apart <= 1e-7 * unit
        else:  # hardly a direction improves all clusters
            assert worst.abs() + apart <= 1e-4 * unit


def test_cagrad_is_as_good_as_torchjds(jacobians):
    pytest.importorskip("cvxpy")
    theirs = pytest.importorskip("torchjd.aggregation").CAGradWeighting(c=0.5, norm_eps=0)
    for rows in jacobians(("ordinary", "duplicated", "nearly parallel"), number=30):
        rows = rows / rows.norm(dim=1).amax()
        found, other = dm.CAGrad()(rows @ rows.T) / len(rows) @ rows, theirs(rows @ rows.T) @ rows
        assert (found - other).norm() <= 1e-2 * found.norm()
        assert (rows @ found).amin() >= (rows @ other).amin() - 1e-7


def test_cagrad_without_a_radius_is_ordinary_training():
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dm.CAGrad(0)(rows @ rows.T), torch.ones(5))


def test_cagrad_refuses():
    with pytest.raises(ValueError, match="c: expected at least 0, found -1"):
        dm.CAGrad(-1)
