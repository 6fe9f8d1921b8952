"""nash_weights against its defining equation, analytic cases and hard Gramians."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast import ops


def residual(gramian, weights, present=None):
    """Return max |α_k (G̃α)_k − 1| over the present clusters."""
    present = (
        torch.ones(len(weights), dtype=torch.bool, device=weights.device) if present is None else present
    )
    game = gramian.double()[present][:, present]
    alpha = weights.double()[present]
    return (alpha * (game / game.norm() @ alpha) - 1).abs().max().item()


def random_gramian(k, spread, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** ((torch.rand(k, 1, generator=generator) - 0.5) * spread).double()
    jacobian = torch.randn(k, 4 * k, generator=generator, dtype=torch.float64) * scales
    return (jacobian @ jacobian.T).to(dtype)


@settings(max_examples=200, deadline=None)
@given(k=st.integers(1, 20), spread=st.floats(0, 12), seed=st.integers(0, 10_000))
def test_solves_the_bargaining_equation(k, spread, seed):
    gramian = random_gramian(k, spread, seed)
    weights = ops.nash_weights(gramian)
    assert (weights > 0).all()
    assert residual(gramian, weights) < 1e-9


@pytest.mark.parametrize("k", [33, 64])
def test_many_clusters(k, device):
    gramian = random_gramian(k, 4, seed=k).to(device)
    assert residual(gramian, ops.nash_weights(gramian)) < 1e-9


def test_one_cluster_is_ordinary_training(device):
    assert ops.nash_weights(torch.tensor([[7.3]], device=device)).item() == pytest.approx(1)


@pytest.mark.parametrize("k", [2, 5])
def test_orthogonal_gradients_of_one_length(k, device):
    # G̃ = I / √K, hence α² = √K.
    weights = ops.nash_weights(3.0 * torch.eye(k, dtype=torch.float64, device=device))
    torch.testing.assert_close(weights, torch.full_like(weights, k**0.25), rtol=1e-12, atol=0)


def test_orthogonal_gradients_of_any_length(device):
    # G̃ = D / ‖D‖, hence α_k = √(‖D‖ / D_k): each cluster moves the model equally far.
    norms = torch.tensor([1e-4, 1.0, 1e4], dtype=torch.float64, device=device)
    weights = ops.nash_weights(norms.diag())
    torch.testing.assert_close(weights, (norms.norm() / norms).sqrt(), rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(exponent=st.integers(-30, 30), seed=st.integers(0, 1000))
def test_the_scale_of_the_gradients_does_not_matter(exponent, seed):
    gramian = random_gramian(4, 2, seed)
    torch.testing.assert_close(
        ops.nash_weights(gramian * 10.0**exponent), ops.nash_weights(gramian), rtol=1e-9, atol=0
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000))
def test_equivariant_under_permutation(seed):
    gramian = random_gramian(5, 4, seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    permuted = ops.nash_weights(gramian[order][:, order])
    torch.testing.assert_close(permuted, ops.nash_weights(gramian)[order], rtol=1e-9, atol=0)


def test_absent_and_zero_gradients_are_left_out(device):
    gramian = torch.zeros(5, 5, dtype=torch.float64)
    active = torch.tensor([True, False, True, True, False])
    gramian[active.outer(active)] = random_gramian(3, 2, seed=0).flatten()
    gramian[1, 1] = 4.0  # absent, with rubbish left in G
    gramian[0, 1] = gramian[1, 0] = -1.0
    present = torch.tensor([True, False, True, True, True], device=device)  # cluster 4: a zero gradient
    weights = ops.nash_weights(gramian.to(device), present)
    assert weights[~active.to(device)].tolist() == [0, 0]
    expected = ops.nash_weights(random_gramian(3, 2, seed=0)).to(device)
    torch.testing.assert_close(weights[active.to(device)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [2, 3, 8, 64])
def test_singular_gramians_give_a_bounded_step(k, dtype, device):
    # Exactly opposed and exactly equal gradients: no solution in exact arithmetic, a finite one up to rounding.
    jacobian = torch.randn(k, 3, generator=torch.Generator().manual_seed(k), dtype=dtype)
    jacobian[1] = -2 * jacobian[0]
    jacobian[-1] = jacobian[0] if k > 2 else jacobian[-1]
    gramian = (jacobian @ jacobian.T).to(device)
    weights = ops.nash_weights(gramian).cpu().double()
    assert weights.isfinite().all()
    assert (weights > 0).all()
    # ‖Σ α_k g_k‖² ≤ K ‖G‖_F holds for the exact solution.
    length = (weights @ jacobian.double()).norm() ** 2 / (k * gramian.cpu().double().norm())
    assert length < 1.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_overflowed_gradients_are_not_hidden(value, device):
    gramian = torch.eye(3, device=device)
    gramian[1, 1] = value
    assert ops.nash_weights(gramian).isnan().all()
    present = torch.tensor([True, False, True], device=device)
    assert ops.nash_weights(gramian, present).isfinite().all()


@pytest.mark.parametrize(
    ("gramian", "present", "error", "message"),
    [
        (torch.zeros(2, 3), None, ValueError, r"\[K, K\] with K >= 1, found \[2, 3\]"),
        (torch.zeros(0, 0), None, ValueError, r"K >= 1, found \[0, 0\]"),
        (
            torch.eye(2),
            torch.ones(3, dtype=torch.bool),
            ValueError,
            r"bool mask of shape \[2\], found torch.bool of shape \[3\]",
        ),
        (torch.eye(2), torch.ones(2), TypeError, "bool mask of shape"),
    ],
)
def test_refuses(gramian, present, error, message):
    with pytest.raises(error, match=message):
        ops.nash_weights(gramian, present)
