"""FairGrad against its defining equation, NashMTL and TorchJD."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation(alpha, jacobians):
    for rows in jacobians():
        gramian = rows @ rows.T
        game = gramian + torch.finfo(torch.float64).eps ** 0.5 * torch.diag(gramian.diagonal())
        w = dm.FairGrad(alpha)(gramian)
        assert (w > 0).all()
        assert (game / gramian.norm() @ w * w ** (1 / alpha) - 1).abs().amax() <= 1e-4


def test_fairgrad_of_one_is_nash(jacobians):
    for rows in jacobians(("ordinary", "lengths over six decades"), number=40):
        torch.testing.assert_close(
            dm.FairGrad(1.0)(rows @ rows.T), dm.NashMTL()(rows @ rows.T), rtol=1e-6, atol=0
        )


def test_fairgrad_is_torchjds(jacobians):
    pytest.importorskip("scipy")
    theirs = pytest.importorskip("torchjd.aggregation").FairGradWeighting(alpha=2.0, max_iters=500)
    for rows in jacobians(("ordinary",), number=20):
        gramian = rows @ rows.T
        gramian = gramian / gramian.norm()
        torch.testing.assert_close(dm.FairGrad()(gramian), theirs(gramian), rtol=1e-3, atol=0)


def test_fairgrad_refuses():
    for alpha in (0.0, 6.0, float("nan")):
        with pytest.raises(ValueError, match=r"alpha: expected 0\.5 to 5, found"):
            dm.FairGrad(alpha)
