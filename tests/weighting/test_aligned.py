"""Aligned-MTL against the singular value decomposition of the gradients themselves, and against TorchJD."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm

KINDS = ("ordinary", "few dimensions", "duplicated", "opposed")


def test_aligned_mtl_is_the_mean_of_equally_long_components(jacobians):
    for rows in jacobians(KINDS):
        left, values, _ = torch.linalg.svd(rows, full_matrices=False)
        kept = values > 1e-6 * values[0]
        left, values = left[:, kept], values[kept]
        expected = left @ (values[-1] / values * left.sum(0))
        torch.testing.assert_close(dm.AlignedMTL()(rows @ rows.T), expected, rtol=1e-7, atol=1e-7)


def test_aligned_gradients_are_orthogonal_and_equally_long():
    """The weights of each aligned gradient are a row of √σ G^(−1/2), whose sum over the rows is w."""
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    aligned = vectors @ torch.diag((values[0] / values).sqrt()) @ vectors.T @ rows
    torch.testing.assert_close(aligned @ aligned.T, values[0] * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(dm.AlignedMTL()(rows @ rows.T) @ rows, aligned.sum(0))


def test_aligned_mtl_is_torchjds(jacobians):
    theirs = pytest.importorskip("torchjd.aggregation").AlignedMTLWeighting()
    for rows in jacobians(("ordinary",), number=20):
        torch.testing.assert_close(dm.AlignedMTL()(rows @ rows.T), theirs(rows @ rows.T) * len(rows))
