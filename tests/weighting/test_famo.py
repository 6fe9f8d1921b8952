"""FAMO: the published step and update of the logits, one step later; what it levels; refusals."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm

K = 3


def objectives(x):
    """Three losses of one parameter vector, of sizes that differ."""
    centres = torch.tensor([[0.0, 1.0], [2.0, 0.0], [-1.0, -1.0]], dtype=torch.float64)
    return (x - centres).square().sum(1) * torch.tensor([1.0, 10.0, 0.01]) + 0.1


def published(steps, lr, logits_lr, decay):
    """FAMO by its definition: the logits learn from the losses before and after, by Adam."""
    x = torch.tensor([3.0, 3.0], dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=logits_lr, weight_decay=decay)
    before, trace = None, []
    for _ in range(steps):
        losses = objectives(x)
        shares = logits.softmax(0)
        divisor = (shares / losses).sum().detach()
        (slope,) = torch.autograd.grad((shares.detach() * losses.log()).sum() / divisor, x)
        # The fall of the last step is known with this step's losses: one step later than in the paper.
        fallen = torch.zeros(K).double() if before is None else before - losses.detach().log()
        optimizer.zero_grad()
        (logits.grad,) = torch.autograd.grad(shares, logits, grad_outputs=fallen)
        optimizer.step()
        before = losses.detach().log()
        trace.append((x.detach().clone(), logits.detach().clone()))
        with torch.no_grad():
            x -= lr * slope
    return trace


def test_famo_is_the_published_algorithm_with_logits_one_step_later():
    expected = published(40, lr=0.01, logits_lr=0.025, decay=0.01)
    weighting = dm.FAMO(K).double()
    x = torch.tensor([3.0, 3.0], dtype=torch.float64, requires_grad=True)
    logits = torch.optim.Adam(weighting.parameters(), lr=0.025)
    for where, learned in expected:
        torch.testing.assert_close(x.detach(), where)
        x.grad = None
        logits.zero_grad()
        weighting(objectives(x)).backward()
        logits.step()
        torch.testing.assert_close(weighting.logits.detach(), learned)
        with torch.no_grad():
            x -= 0.01 * x.grad
    assert weighting.logits.abs().max() > 0.02


@pytest.mark.parametrize("absent", [[], [1]])
def test_famo_s_weights_average_one(absent, device):
    present = torch.ones(K, dtype=torch.bool, device=device)
    present[absent] = False
    weighting = dm.FAMO(K).to(device).double()
    weighting.logits.data = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64, device=device)
    losses = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, device=device, requires_grad=True)
    scalar = weighting(losses, present)
    z = weighting.logits.detach()[present].softmax(0)
    ratio = z / losses.detach()[present]
    (slopes,) = torch.autograd.grad(scalar, losses)
    torch.testing.assert_close(slopes[present], ratio / ratio.sum())
    torch.testing.assert_close(scalar.detach(), (z * losses.detach()[present].log()).sum() / ratio.sum())


def test_famo_takes_weight_from_the_cluster_that_improves_most():
    weighting = dm.FAMO(K, decay=0.0)
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.1)
    for losses in ([1.0, 1.0, 1.0], [0.5, 1.0, 1.0]):
        optimizer.zero_grad()
        weighting(torch.tensor(losses)).backward()
        optimizer.step()
    first, *others = weighting.logits.tolist()
    assert first < 0 < min(others)
    assert sum(weighting.logits.tolist()) == pytest.approx(0, abs=1e-7)


def test_famo_remembers_the_loss_of_an_absent_cluster():
    weighting, present = dm.FAMO(2), torch.tensor([True, False])
    weighting(torch.tensor([1.0, 4.0]))
    weighting(torch.tensor([1.0, 9.0]), present)
    weighting(torch.tensor([1.0, 2.0])).backward()
    # δ = (0, log 4 − log 2) through the softmax of equal logits: ∂z/∂ξ is ±1/4.
    slope = torch.tensor([-0.25, 0.25]) * torch.tensor(2.0).log()
    torch.testing.assert_close(weighting.logits.grad, slope)


def test_famo_refuses():
    with pytest.raises(ValueError, match="num_clusters: expected at least 1, found 0"):
        dm.FAMO(0)
    with pytest.raises(ValueError, match="decay: expected at least 0, found -1"):
        dm.FAMO(2, decay=-1)
    with pytest.raises(ValueError, match="losses: expected at least 0"):
        dm.FAMO(2)(torch.tensor([1.0, -1.0]))
