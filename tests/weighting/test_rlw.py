"""RLW: a softmax of normal numbers, drawn anew, resumed by the state."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm


def weights(weighting, present=None):
    losses = torch.tensor([0.5, 2.0, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    scalar = weighting(losses, present)
    (slopes,) = torch.autograd.grad(scalar, losses)
    torch.testing.assert_close(scalar.detach(), (slopes * losses).sum().detach())
    return slopes


def test_rlw_is_a_softmax_of_the_normal_numbers_that_the_generator_draws():
    weighting, again = (
        dm.RLW(torch.Generator().manual_seed(5)),
        torch.Generator().manual_seed(5),
    )
    for _ in range(3):
        z = torch.randn(4, generator=again).double()
        torch.testing.assert_close(weights(weighting), z.exp() / z.exp().sum())
    z, present = torch.randn(4, generator=again).double(), torch.tensor([True, False, True, True])
    expected = torch.where(present, z.exp(), 0)
    torch.testing.assert_close(weights(weighting, present), expected / expected.sum())


def test_rlw_state_resumes_the_draws(tmp_path):
    weighting = dm.RLW(torch.Generator().manual_seed(3))
    weights(weighting)
    torch.save(weighting.state_dict(), tmp_path / "state.pt")
    resumed = dm.RLW(torch.Generator())
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(weights(resumed), weights(weighting))
    with pytest.raises(
        ValueError, match="RLW: expected a state saved without a generator, found one saved with"
    ):
        dm.RLW().load_state_dict(weighting.state_dict())


def test_rlw_without_a_generator_draws_torch_s_own_numbers():
    torch.manual_seed(1)
    first = weights(dm.RLW())
    torch.manual_seed(1)
    assert torch.equal(weights(dm.RLW()), first)
    assert not torch.equal(weights(dm.RLW()), first)
