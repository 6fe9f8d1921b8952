"""uncertainty_loss against the published sum in float64."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm
from benchmarks.reference import uncertainty_weighting


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)
def test_equals_the_published_sum(dtype, tolerance, weighted, generator, device):
    pred, target = (torch.randn(7, 3, 5, generator=generator, device=device).to(dtype) for _ in range(2))
    cluster = torch.tensor([0, 3, 3, 0, 1, 0, 3], device=device)  # cluster 2 is absent
    log_var = torch.tensor([0.3, -1.0, 0.5, 2.0], device=device)
    weight = torch.rand(7, generator=generator, device=device) if weighted else None

    exact = [x.double().requires_grad_() for x in (pred, target, log_var)]
    errors = (exact[0] - exact[1]).square().mean((1, 2)) * (1 if weight is None else weight.double())
    losses = torch.stack([errors[cluster == k].sum() / max(int((cluster == k).sum()), 1) for k in range(4)])
    present = torch.tensor([True, True, False, True], device=device)
    expected = uncertainty_weighting(losses, exact[2], present)
    (3 * expected).backward()

    inputs = [x.requires_grad_() for x in (pred, target, log_var)]
    found = dm.ops.uncertainty_loss(pred, target, cluster, log_var, weight)
    (3 * found).backward()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    for x, reference in zip(inputs, exact, strict=True):
        assert x.grad.dtype == x.dtype
        allowed = tolerance if x.dtype == dtype else max(tolerance, 1e-6)
        assert ((x.grad.double() - reference.grad).norm() / reference.grad.norm()).item() < allowed
    assert log_var.grad[2] == 0


def test_equals_its_plain_definition_on_strided_inputs(generator, device):
    pred, target = (torch.randn(12, 4, 3, generator=generator, device=device)[::2].mT for _ in range(2))
    cluster = torch.tensor([0, 9, 4, 9, 4, 9, 0, 9, 4, 9, 2, 9], device=device)[::2]
    log_var = torch.randn(5, 2, generator=generator, device=device, dtype=torch.float64)[:, 1]
    weight = torch.rand(1, generator=generator, device=device).expand(6)
    found = torch.ops.diffmtl.uncertainty_loss(pred, target, cluster, log_var, weight)
    expected = dm.ops.PLAIN["uncertainty_loss"](pred, target, cluster, log_var, weight)
    torch.testing.assert_close(found, expected)


def test_no_samples(device):
    empty, log_var = torch.zeros(0, 3, device=device), torch.zeros(2, device=device, requires_grad=True)
    loss = dm.ops.uncertainty_loss(empty, empty, torch.zeros(0, dtype=torch.int64, device=device), log_var)
    loss.backward()
    assert loss == 0
    assert (log_var.grad == 0).all()


def test_is_the_weighting_of_the_cluster_losses(generator, device):
    pred, target = (torch.randn(6, 4, generator=generator, device=device) for _ in range(2))
    cluster = torch.tensor([0, 1, 1, 0, 2, 2], device=device)
    weighting = dm.UncertaintyWeighting(3).to(device)
    found = dm.ops.uncertainty_loss(pred, target, cluster, weighting.log_var)
    torch.testing.assert_close(found, weighting(dm.ops.cluster_mse(pred, target, cluster, 3)))


@pytest.mark.parametrize(
    ("log_var", "error", "message"),
    [
        (torch.zeros(2, 2), ValueError, r"\[k\], found \[2, 2\]"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "found torch.int64"),
        (torch.zeros(1), ValueError, r"indices in 0..0, found 1"),
    ],
)
def test_refuses(log_var, error, message):
    with pytest.raises(error, match=message):
        dm.ops.uncertainty_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), log_var)
