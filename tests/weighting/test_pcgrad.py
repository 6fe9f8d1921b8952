"""PCGrad: orders, state."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm


def test_pcgrad_orders_are_permutations_drawn_by_the_generator():
    weighting = dm.PCGrad(torch.Generator().manual_seed(3))
    orders = torch.stack([weighting.draw_order(5) for _ in range(400)])
    for k in range(5):
        assert orders[:, k].sort(dim=1).values.tolist() == [[j for j in range(5) if j != k]] * 400
    # All 24 orders of a row come up, none much more often than the others: expected 16.7 of each.
    counts = torch.unique(orders[:, 0], dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.max() < 40
    again = dm.PCGrad(torch.Generator().manual_seed(3))
    assert torch.equal(again.draw_order(5), orders[0])


def test_pcgrad_state_resumes_the_orders(tmp_path):
    weighting = dm.PCGrad(torch.Generator().manual_seed(3))
    weighting.draw_order(5)
    torch.save(weighting.state_dict(), tmp_path / "state.pt")
    resumed = dm.PCGrad(torch.Generator())
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.draw_order(6), weighting.draw_order(6))
    with pytest.raises(ValueError, match="expected a state saved without a generator, found one saved with"):
        dm.PCGrad().load_state_dict(weighting.state_dict())


def test_pcgrad_depends_on_the_order():
    jacobian = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]])
    weights = [
        dm.ops.pcgrad_weights(jacobian @ jacobian.T, torch.tensor([first, [0, 2], [0, 1]]))
        for first in ([1, 2], [2, 1])
    ]
    assert not torch.allclose(*weights)


def test_pcgrad_refuses_a_missing_gramian():
    with pytest.raises(TypeError, match="found None"):
        dm.PCGrad()(None)
