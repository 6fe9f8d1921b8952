"""The weighting modules: definitions, masks, state."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm
from benchmarks.reference import nash_weights as published_nash
from benchmarks.reference import uncertainty_weighting as published_uncertainty


def gramian(k=4, seed=0):
    jacobian = torch.randn(k, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (jacobian @ jacobian.T).float()


def test_equal_is_the_mean_of_the_present_losses(device):
    losses = torch.tensor([1.0, 5.0, 3.0], device=device, requires_grad=True)
    assert dm.Equal()(losses).item() == 3
    dm.Equal()(losses, torch.tensor([True, False, True], device=device)).backward()
    assert losses.grad.tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("absent", [[], [1], [0, 2]])
def test_uncertainty_weighting_equals_the_published_sum(absent, device):
    present = torch.ones(4, dtype=torch.bool, device=device)
    present[absent] = False
    weighting = dm.UncertaintyWeighting(4).to(device)
    weighting.log_var.data = torch.tensor([0.3, -1.0, 0.0, 2.0], device=device)
    losses = torch.tensor([0.5, 2.0, 1.0, 4.0], device=device, requires_grad=True)
    u, expected_losses = (x.detach().clone().requires_grad_() for x in (weighting.log_var, losses))
    expected = published_uncertainty(expected_losses, u, present)
    found = weighting(losses, present)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(losses.grad, expected_losses.grad)
    torch.testing.assert_close(weighting.log_var.grad, u.grad)
    assert weighting.log_var.grad[absent].abs().sum() == 0


def test_uncertainty_weighting_learns_the_log_losses():
    # The minimum over u_k of ½ (e^{−u} L / K + u) is u = log(L / K).
    weighting, losses = dm.UncertaintyWeighting(3), torch.tensor([0.3, 3.0, 9.0])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_var.detach(), (losses / 3).log(), rtol=0, atol=1e-2)


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


def test_param_groups_give_the_log_variances_a_rate_of_their_own():
    model, weighting = torch.nn.Linear(3, 2), dm.UncertaintyWeighting(4)
    model.bias.requires_grad_(False)
    groups = dm.param_groups(model, weighting, lr=1e-4, weight_decay=0.1)
    assert groups[0] == {"params": [model.weight], "lr": 1e-4, "weight_decay": 0.1}
    assert groups[1] == {"params": [weighting.log_var], "lr": 0.025, "weight_decay": 0.0}
    wrapped = dm.ClusteredMTL(model, 4, weighting)
    assert [g["params"] for g in dm.param_groups(wrapped, weighting)] == [[model.weight], [weighting.log_var]]
    assert len(dm.param_groups(model, dm.PCGrad(), lr=1e-4)) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dm.UncertaintyWeighting(0), ValueError, "at least 1, found 0"),
        (lambda: dm.UncertaintyWeighting(3)(torch.zeros(4)), ValueError, r"\[3\], found \[4\]"),
        (lambda: dm.Equal()(torch.zeros(2, 2)), ValueError, r"\[K\], found \[2, 2\]"),
        (lambda: dm.Equal()(torch.zeros(2, dtype=torch.int64)), TypeError, "found torch.int64"),
        (lambda: dm.PCGrad()(None), TypeError, "found None"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
