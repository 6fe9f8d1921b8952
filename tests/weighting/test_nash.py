"""NashMTL: the published solver, refreshes, absent clusters, state."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm
from benchmarks.reference import nash_weights as published_nash


def gramian(k=4, seed=0):
    jacobian = torch.randn(k, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (jacobian @ jacobian.T).float()


def test_nash_agrees_with_the_published_solver():
    pytest.importorskip("ecos")
    for seed in range(5):
        g = gramian(seed=seed)
        torch.testing.assert_close(dm.NashMTL()(g).double(), published_nash(g), rtol=1e-2, atol=0)


def test_nash_refreshes_every_n_steps():
    weighting = dm.NashMTL(update_every=3)
    needed, found = [], []
    for step in range(7):
        needed.append(weighting.needs_gramian)
        found.append(weighting(gramian(seed=step) if needed[-1] else None))
    assert needed == [True, False, False, True, False, False, True]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[2], found[3])
    torch.testing.assert_close(found[3], dm.ops.nash_weights(gramian(seed=3)))


def test_nash_keeps_the_weight_of_an_absent_cluster():
    weighting, present = dm.NashMTL(update_every=2), torch.tensor([True, True, False, True])
    first = weighting(gramian(), present)
    assert first[2] == 0
    second = weighting(None)
    assert second[2] == 1  # never weighed yet
    assert torch.equal(second[present], first[present])
    full = weighting(gramian(seed=1))
    weighting(None, present)
    weighting(gramian(seed=2), present)
    assert weighting(None)[2] == full[2]


def test_nash_does_not_keep_overflowed_weights():
    weighting = dm.NashMTL(update_every=1)
    good = weighting(gramian())
    assert weighting(torch.full((4, 4), float("inf"))).isnan().all()
    assert torch.equal(weighting.weights, good)


def test_nash_refuses_a_missing_gramian():
    with pytest.raises(TypeError, match="at step 0, found None"):
        dm.NashMTL()(None)
    with pytest.raises(ValueError, match="update_every: expected at least 1, found 0"):
        dm.NashMTL(update_every=0)
    weighting = dm.NashMTL()
    weighting(gramian())
    with pytest.raises(ValueError, match="K = 4 as before, found K = 3"):
        weighting(gramian(k=3))


def test_nash_state_resumes(tmp_path):
    weighting = dm.NashMTL(update_every=3)
    weighting(gramian())
    torch.save(weighting.state_dict(), tmp_path / "state.pt")
    resumed = dm.NashMTL(update_every=3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not resumed.needs_gramian
    assert torch.equal(resumed(None), weighting(None))
