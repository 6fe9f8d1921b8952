"""The random projection against its moments, over all signs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffmtl_fast.analysis.projection import RandomProjection, cosine_error_bound


def test_moments_over_all_signs():
    """Two pieces of two elements: with all 256 signs the expectations are means."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    exact = float(rows[0] @ rows[1])
    project, found = RandomProjection(4, 2), []
    for signs in itertools.product((-1, 1), repeat=8):
        project.inner, project.outer = torch.tensor(signs, dtype=torch.int8).view(2, 2, 2)
        left, right = project(rows)
        found.append(float(left @ right))
    errors = torch.tensor(found, dtype=torch.float64) - exact
    assert errors.mean() == pytest.approx(0.0, abs=1e-14)
    pieces = rows.view(2, 2, 2)
    squares, inner = pieces.square().sum(2), (pieces[0] * pieces[1]).sum(1)
    expected = (squares[0, 0] * squares[1, 1] + squares[0, 1] * squares[1, 0] + 2 * inner.prod()) / 2
    assert errors.square().mean() == pytest.approx(float(expected))
    assert errors.square().mean() <= (1 + exact**2) / 2


@pytest.mark.parametrize("dimension", [2, 8, 32])
@pytest.mark.parametrize("width", [1, 31, 32, 200])
@pytest.mark.parametrize("elements", [1, 2**22])
def test_the_map_is_linear_and_the_sum_of_rotated_pieces(dimension, width, elements, device, monkeypatch):
    monkeypatch.setattr("diffmtl_fast.analysis.projection._ELEMENTS", elements)
    project = RandomProjection(width, dimension, seed=1, device=device)
    matrix = project(torch.eye(width, dtype=torch.float64, device=device)).T  # [D, P]
    for first in range(0, width, dimension):  # each piece is rotated alone
        piece = matrix[:, first : first + dimension]
        torch.testing.assert_close(
            piece.T @ piece, torch.eye(piece.shape[1], dtype=torch.float64, device=device)
        )
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(dimension)))
    rows = torch.randn(3, width, dtype=torch.float64, device=device)
    torch.testing.assert_close(project(rows), rows @ matrix.T)


def test_a_seed_repeats_the_signs():
    a, b, c = (RandomProjection(100, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(a.inner, b.inner)
    assert torch.equal(a.outer, b.outer)
    assert not torch.equal(a.inner, c.inner)


def test_bound():
    assert cosine_error_bound(4096) == pytest.approx(0.0533, abs=1e-4)


@pytest.mark.parametrize("dimension", [0, 1, 12, -4])
def test_bad_dimensions(dimension):
    with pytest.raises(ValueError, match="expected a power of two"):
        RandomProjection(10, dimension)
