from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.reference import (
    Batch,
    cluster_gradients,
    nash_residual,
    nash_step,
    pcgrad_step,
    plain_step,
    random_orders,
    uw_step,
)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(*batch.inputs) - batch.target) ** 2).mean(1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2)).double()
    net[0].bias.requires_grad_(False)
    return net


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return Batch((x,), y, torch.tensor([0, 0, 1, 1, 3, 3]))


def _grad(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _jacobian(model: nn.Module, batch: Batch) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return cluster_gradients(loss_fn(model, batch), batch.cluster, parameters, 4).jacobian


def test_without_conflict_pcgrad_is_plain_training(model: nn.Module, batch: Batch) -> None:
    same = Batch((batch.inputs[0][:2].repeat(3, 1),), batch.target[:2].repeat(3, 1), batch.cluster)
    plain_step(model, loss_fn, same)
    expected = _grad(model)
    model.zero_grad()
    gradients = pcgrad_step(model, loss_fn, same, random_orders(4))
    assert gradients.present.tolist() == [True, True, False, True]
    torch.testing.assert_close(_grad(model), expected)
    assert model[0].bias.grad is None


def test_steps_accumulate_into_grad(model: nn.Module, batch: Batch) -> None:
    orders = random_orders(4, torch.Generator().manual_seed(0))
    pcgrad_step(model, loss_fn, batch, orders)
    once = _grad(model)
    pcgrad_step(model, loss_fn, batch, orders)
    torch.testing.assert_close(_grad(model), 2 * once)


def test_uw_step_weighs_each_cluster_and_learns_its_variance(model: nn.Module, batch: Batch) -> None:
    u = torch.tensor([0.0, 1.0, 7.0, -1.0], dtype=torch.float64, requires_grad=True)
    jacobian, losses = _jacobian(model, batch), loss_fn(model, batch).detach().view(3, 2).mean(1)
    uw_step(model, loss_fn, batch, u)
    weights = 0.5 * torch.exp(-u.detach())
    torch.testing.assert_close(_grad(model), weights @ jacobian / 3)
    assert u.grad is not None
    torch.testing.assert_close(u.grad[[0, 1, 3]], 0.5 - weights[[0, 1, 3]] * losses / 3)
    assert u.grad[2] == 0


def test_nash_step_is_the_bargain(model: nn.Module, batch: Batch) -> None:
    pytest.importorskip("cvxpy")
    pytest.importorskip("ecos")
    gradients = nash_step(model, loss_fn, batch, 4)
    descent = (gradients.jacobian @ _grad(model))[gradients.present]
    assert (descent > 0).all()
    # (Gα)_k = n ⟨g_k, d⟩ = ‖G‖ / α_k gives α back from the update alone.
    gramian = (gradients.jacobian @ gradients.jacobian.T)[gradients.present][:, gradients.present]
    alpha = gramian.norm() / (3 * descent)
    assert nash_residual(gramian.numpy(), alpha.numpy()) < 1e-2
