"""IMTL-G against its definition, in the gradients themselves."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm

INDEPENDENT = ("ordinary", "lengths over six decades", "nearly parallel")


def test_imtl_g_projects_equally_onto_all_gradients(jacobians):
    for rows in jacobians(INDEPENDENT):
        alpha = dm.IMTLG()(rows @ rows.T) / len(rows)
        units = rows / rows.norm(dim=1, keepdim=True)
        terms = alpha.unsqueeze(1) * rows
        projections = units @ terms.sum(0)
        assert (projections - projections.mean()).abs().amax() <= 1e-9 * terms.norm(dim=1).amax()
        assert (alpha.sum() - 1).abs() <= 1e-9 * alpha.abs().sum()


def test_imtl_g_is_torchjds(jacobians):
    theirs = pytest.importorskip("torchjd.aggregation").IMTLGWeighting()
    for rows in jacobians(("ordinary", "duplicated"), number=40):
        rows = rows / rows.norm()
        weights = dm.IMTLG()(rows @ rows.T) / len(rows)
        torch.testing.assert_close(weights, theirs(rows @ rows.T), rtol=1e-6, atol=1e-6)


def test_imtl_g_of_opposed_gradients_is_zero():
    rows = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert torch.equal(dm.IMTLG()(rows @ rows.T), torch.zeros(2))
