from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.reference import (
    NashError,
    nash_residual,
    nash_weights,
    pcgrad,
    random_orders,
    uncertainty_weighting,
    update_direction,
    weighting,
)

needs_ecos = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cvxpy", "ecos")),
    reason="cvxpy and ECOS are not installed",
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_direction_with_equal_weights_is_the_gradient_of_the_mean_loss() -> None:
    jacobian, present = randn(4, 6), torch.tensor([True, True, False, True])
    direction = update_direction(jacobian, torch.ones(4), present)
    torch.testing.assert_close(direction, jacobian[present].mean(0))


def test_uncertainty_weighting_at_zero_is_half_the_mean_loss() -> None:
    losses, present = torch.tensor([1.0, 2.0, 100.0, 3.0]), torch.tensor([True, True, False, True])
    assert uncertainty_weighting(losses, torch.zeros(4), present).item() == pytest.approx(1.0)


def test_uncertainty_is_stationary_at_the_log_of_the_weighted_loss() -> None:
    losses = torch.tensor([0.5, 4.0, 9.0])
    present = torch.tensor([True, True, False])
    u = (losses / 2).log().requires_grad_()
    uncertainty_weighting(losses, u, present).backward()
    torch.testing.assert_close(u.grad, torch.zeros(3))


def test_random_orders_are_permutations_of_the_others() -> None:
    orders = random_orders(6, torch.Generator().manual_seed(1))
    for k, order in enumerate(orders.tolist()):
        assert sorted(order) == [j for j in range(6) if j != k]


def test_pcgrad_of_one_gradient_is_that_gradient() -> None:
    torch.testing.assert_close(pcgrad(randn(1, 5), torch.empty(1, 0, dtype=torch.int64)), randn(1, 5)[0])


@pytest.mark.parametrize("conflict", [False, True])
def test_pcgrad_of_two_gradients_has_a_closed_form(conflict: bool) -> None:
    a, b = randn(8), randn(8, seed=1)
    b = b if (a @ b < 0) == conflict else -b
    expected = a + b
    if conflict:
        expected = expected - (a @ b) * (b / (b @ b) + a / (a @ a))
    torch.testing.assert_close(pcgrad(torch.stack([a, b]), torch.tensor([[1], [0]])), expected)


@pytest.mark.parametrize(("order", "expected"), [([1, 2], [-1.2, -0.9]), ([2, 1], [-1.2, -0.6])])
def test_pcgrad_projects_along_the_originals_in_the_given_order(
    order: list[int], expected: list[float]
) -> None:
    # By hand: g_0' = (0.2, -0.1) or (0.2, 0.2), g_1' = (-0.4, 0.2), g_2' = (-1, -1).
    jacobian = torch.tensor([[1, 0], [-1, 1], [-1, -2]], dtype=torch.float64)
    direction = pcgrad(jacobian, torch.tensor([order, [0, 2], [0, 1]]))
    torch.testing.assert_close(direction, torch.tensor(expected, dtype=torch.float64))


def test_pcgrad_ignores_an_absent_cluster() -> None:
    jacobian = randn(4, 3)
    without = pcgrad(jacobian[:3], torch.tensor([[1, 2], [2, 0], [0, 1]]))
    jacobian[3] = 0
    orders = torch.tensor([[3, 1, 2], [2, 3, 0], [0, 1, 3], [2, 0, 1]])
    torch.testing.assert_close(pcgrad(jacobian, orders), without)


def test_pcgrad_refuses_a_table_that_is_no_permutation() -> None:
    with pytest.raises(ValueError, match=r"orders\[1\]: expected a permutation of all clusters but 1"):
        pcgrad(randn(3, 4), torch.tensor([[1, 2], [1, 2], [0, 1]]))


@needs_ecos
@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_nash_solves_its_equation(size: int, scale: float) -> None:
    jacobian = scale * (randn(size, 40, seed=size) + randn(40))
    gramian = jacobian @ jacobian.T
    alpha = nash_weights(gramian)
    torch.testing.assert_close(gramian @ alpha / gramian.norm(), 1 / alpha, rtol=1e-3, atol=0)
    assert nash_residual(gramian.numpy(), alpha.numpy()) <= 1e-3


@needs_ecos
@pytest.mark.parametrize("recompile", [False, True])
def test_nash_of_orthogonal_gradients_divides_by_their_norms(recompile: bool) -> None:
    # G = diag(s²): α_k = √‖G‖ / s_k
    norms = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    gramian = torch.diag(norms**2)
    alpha = nash_weights(gramian, recompile=recompile)
    torch.testing.assert_close(alpha, gramian.norm().sqrt() / norms, rtol=1e-4, atol=0)


@needs_ecos
def test_nash_masks_absent_clusters() -> None:
    jacobian, present = randn(4, 30), torch.tensor([True, False, True, True])
    jacobian[1] = 0
    alpha = nash_weights(jacobian @ jacobian.T, present)
    assert alpha[1] == 0
    torch.testing.assert_close(alpha[present], nash_weights(jacobian[present] @ jacobian[present].T))


@needs_ecos
def test_nash_raises_where_no_bargain_exists() -> None:
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    with pytest.raises(NashError):
        nash_weights(opposite)
    with pytest.raises(NashError, match="not all zero"):
        nash_weights(torch.zeros(2, 2))


@needs_ecos
def test_nash_raises_when_it_has_not_converged() -> None:
    jacobian = torch.diag(torch.tensor([1.0, 10.0, 100.0]))
    with pytest.raises(NashError, match=r"expected max .* found"):
        nash_weights(jacobian @ jacobian.T, iterations=0)


def test_nash_refuses_to_run_without_ecos(monkeypatch: pytest.MonkeyPatch) -> None:
    weighting._require_ecos.cache_clear()
    solvers = SimpleNamespace(installed_solvers=lambda: ["SCS", "CLARABEL"])
    monkeypatch.setattr(weighting, "require", lambda module, extra: solvers)
    with pytest.raises(ImportError, match=r"solver ECOS, found SCS, CLARABEL; run `pip install"):
        nash_weights(torch.eye(2))
