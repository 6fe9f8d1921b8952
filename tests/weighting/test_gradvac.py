"""GradVac against its definition on the gradients themselves; its targets."""

from __future__ import annotations

import math

import pytest
import torch

import diffmtl_fast as dm


def by_definition(rows, orders, targets, beta):
    """The sum of the vaccinated gradients, and the targets after the step."""
    changed, targets = rows.clone(), targets.clone()
    for k, order in enumerate(orders.tolist()):
        for j in order:
            length = changed[k].norm()
            cosine = float(changed[k] @ rows[j] / (length * rows[j].norm()))
            target = float(targets[k, j])
            if cosine < target:
                sine, aimed = math.sqrt(1 - cosine**2), math.sqrt(1 - target**2)
                changed[k] += length * (target * sine - cosine * aimed) / (rows[j].norm() * aimed) * rows[j]
                assert float(changed[k] @ rows[j] / changed[k].norm() / rows[j].norm()) == pytest.approx(
                    target
                )
            targets[k, j] = (1 - beta) * target + beta * cosine
    return changed.sum(0), targets


@pytest.mark.parametrize("k", [2, 5, 9])
def test_gradvac_is_its_definition(k):
    generator, beta = torch.Generator().manual_seed(1), 0.3
    weighting = dm.GradVac(k, beta, torch.Generator().manual_seed(0))
    drawn = dm.PCGrad(torch.Generator().manual_seed(0))
    targets = torch.zeros(k, k, dtype=torch.float64)
    for _ in range(10):
        rows = torch.randn(k, 2 * k, generator=generator, dtype=torch.float64) + 0.5
        expected, targets = by_definition(rows, drawn.draw_order(k), targets, beta)
        torch.testing.assert_close(weighting(rows @ rows.T) @ rows, expected)
        torch.testing.assert_close(weighting.targets, targets)


def test_gradvac_begins_as_pcgrad():
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = (dm.GradVac(5, generator=torch.Generator()), dm.PCGrad(torch.Generator()))
    torch.testing.assert_close(ours(rows @ rows.T), theirs(rows @ rows.T))


def test_gradvac_keeps_the_targets_of_absent_clusters_and_of_steps_that_overflow():
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weighting = dm.GradVac(4, generator=torch.Generator())
    weighting(rows @ rows.T)
    before = weighting.targets.clone()
    weighting(torch.full((4, 4), float("nan")))
    assert torch.equal(weighting.targets, before)
    present = torch.tensor([True, False, True, True])
    weighting(-2 * rows @ rows.T * torch.ones(4, 4).fill_diagonal_(-1), present)
    assert torch.equal(weighting.targets[1], before[1])
    assert torch.equal(weighting.targets[:, 1], before[:, 1])
    assert not torch.equal(weighting.targets[0, 2:], before[0, 2:])


def test_gradvac_stays_bounded_with_gradients_that_were_parallel():
    weighting = dm.GradVac(2, beta=1.0, generator=torch.Generator())
    weighting(torch.ones(2, 2))
    assert weighting(torch.tensor([[1.0, -0.5], [-0.5, 1.0]])).abs().amax() < 2e3


def test_gradvac_refuses():
    with pytest.raises(ValueError, match="num_clusters: expected at least 1, found 0"):
        dm.GradVac(0)
    with pytest.raises(ValueError, match="beta: expected 0 to 1, found 2"):
        dm.GradVac(3, beta=2)
    with pytest.raises(ValueError, match="gramian: expected K = 3, found K = 2"):
        dm.GradVac(3)(torch.eye(2))
