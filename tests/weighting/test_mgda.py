"""MGDA against the minimum-norm point that non-negative least squares finds from the gradients themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

import diffmtl_fast as dm


def shortest(rows):
    """The shortest convex combination, by least squares on [Jᵀ; 1ᵀ] y = [0; 1], a fixed unit apart."""
    rows = rows / np.linalg.norm(rows, axis=1).min()
    y, _ = nnls(np.vstack([rows.T, np.ones(len(rows))]), np.append(np.zeros(rows.shape[1]), 1), maxiter=1000)
    return y / y.sum()


def test_mgda_is_the_shortest_convex_combination(jacobians):
    for rows in jacobians():
        alpha = dm.MGDA()(rows @ rows.T) / len(rows)
        shortest_gradient = rows.norm(dim=1).amin()
        assert (alpha >= 0).all()
        torch.testing.assert_close(alpha.sum(), torch.ones_like(alpha[0]))
        expected = torch.from_numpy(shortest(rows.numpy())) @ rows
        assert (alpha @ rows - expected).norm() <= 3e-7 * shortest_gradient


def test_mgda_of_two_gradients_is_the_closed_form():
    rows = torch.tensor([[2.0, 1.0], [-1.0, 1.0]])
    difference = rows[1] - rows[0]
    alpha = (rows[1] @ difference) / (difference @ difference)
    torch.testing.assert_close(dm.MGDA()(rows @ rows.T), 2 * torch.stack([alpha, 1 - alpha]))


def test_mgda_is_no_longer_than_what_torchjd_finds(jacobians):
    theirs = pytest.importorskip("torchjd.aggregation").MGDAWeighting()
    for rows in jacobians(("ordinary", "duplicated"), number=20):
        found, other = dm.MGDA()(rows @ rows.T) / len(rows) @ rows, theirs(rows @ rows.T) @ rows
        assert found.norm() <= other.norm() * (1 + 1e-9)
        assert found @ other >= found @ found * (1 - 1e-6)
