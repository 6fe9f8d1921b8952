"""nash_weights against its defining equation, analytic cases and hard Gramians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast import ops
from diffmtl_fast.ops import PLAIN


def residual(gramian, weights, present=None):
    """Return max |α_k (G̃α)_k − 1| over the present clusters."""
    present = (
        torch.ones(len(weights), dtype=torch.bool, device=weights.device) if present is None else present
    )
    game = gramian.double()[present][:, present]
    alpha = weights.double()[present]
    return (alpha * (game / game.norm() @ alpha) - 1).abs().max().item()


def everyone(gramian):
    return torch.ones(len(gramian), dtype=torch.bool, device=gramian.device)


# The kernel of the device and the definition.
by_both = pytest.mark.parametrize(
    "solve",
    [ops.nash_weights, lambda g, p=None: PLAIN["nash_weights"](g, everyone(g) if p is None else p)],
    ids=["kernel", "plain"],
)


def with_ridge(gramian, weights):
    """Return max |β_k ((C + μI)β)_k − 1| of what `nash_weights` states for a G of float64 or float32, and μ."""
    game = gramian.double().cpu().numpy()
    norms = np.sqrt(np.diag(game))
    delta = np.sqrt(np.finfo(str(gramian.dtype).removeprefix("torch.")).eps)
    beta = weights.double().cpu().numpy() * norms / np.sqrt(np.linalg.norm(game))
    ridge = delta * max(0, delta * (beta @ beta) / len(beta) - 1)
    image = game @ (beta / norms) / norms + ridge * beta
    return np.abs(beta * image - 1).max(), ridge


def game_with_a_solution(generator, k):
    """Draw gradients, often fewer dimensions than gradients, with norms over 12 decades.

    One direction has a cosine of 2e-4 or more with all of them.
    """
    width = int(torch.randint(2, 2 * k + 2, (), generator=generator))
    rows = torch.randn(k, width, generator=generator, dtype=torch.float64)
    rows[:, 0] = 0
    rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    draws = torch.rand(2, k, generator=generator, dtype=torch.float64)
    rows[:, 0] = 2e-4 * 5000 ** (torch.rand((), generator=generator) * draws[0])
    rows *= 10 ** (12 * draws[1] - 6).unsqueeze(1)
    return rows @ rows.T


def game_without_a_solution(k, dtype, seed):
    """Draw gradients of which the first three cancel, with norms over 6 decades, in exact arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-9, 10, (k, 6), generator=generator, dtype=torch.float64)
    rows[:, 0] = rows[:, 0].abs() + 1  # none is zero
    rows[2] = -rows[0] - 2 * rows[1]
    rows *= 2.0 ** torch.randint(-10, 11, (k, 1), generator=generator)
    return (rows @ rows.T).to(dtype)


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


@by_both
def test_ten_thousand_games_with_a_solution(solve):
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for game in range(10_000 if solve is ops.nash_weights else 300):
        gramian = game_with_a_solution(generator, 1 + game % 20)
        weights = solve(gramian)
        assert (weights > 0).all()
        worst = max(worst, residual(gramian, weights))
    assert worst <= 1e-6


@by_both
@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(3, 12), seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_without_a_solution_the_stated_ridge_is_solved(solve, k, seed, dtype):
    gramian = game_without_a_solution(k, dtype, seed)
    weights = solve(gramian)
    error, ridge = with_ridge(gramian, weights)
    assert 0 < ridge < torch.finfo(dtype).eps ** 0.5
    assert error <= (1e-6 if dtype == torch.float64 else 5e-3)  # of the rounding of the weights to float32


@by_both
@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(3, 12), seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_without_a_solution_rounding_does_not_decide(solve, k, seed, dtype):
    gramian = game_without_a_solution(k, dtype, seed)
    expected, unit = solve(gramian), torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(k, generator=generator)
    tolerance = 20 * unit**0.5
    torch.testing.assert_close(solve(gramian[order][:, order]), expected[order], rtol=tolerance, atol=0)
    noise = 1 + unit * (torch.rand(k, k, generator=generator, dtype=torch.float64) - 0.5)
    rounded = (gramian.double() * (noise + noise.T) / 2).to(dtype)
    torch.testing.assert_close(solve(rounded), expected, rtol=tolerance, atol=0)
    # Nor do the gradients' norms: β_k = α_k ‖g_k‖ is the same up to a factor for all.
    scales = 2.0 ** torch.randint(-20, 21, (k,), generator=generator).to(dtype)
    share = solve(gramian * scales.outer(scales)) * scales / expected
    torch.testing.assert_close(share, share[:1].expand(k), rtol=tolerance, atol=0)


@by_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opposed_gradients_in_closed_form(solve, dtype, device):
    # Cβ = 0, hence μβ² = 1 with μ = δ (δβ² − 1): δβ² is the golden ratio.
    rows = torch.tensor([[3.0], [-0.25]], dtype=dtype, device=device)
    weights = solve(rows @ rows.T).double()
    delta = torch.finfo(dtype).eps ** 0.5
    root = (rows.double() @ rows.double().T).norm().sqrt()
    expected = ((1 + 5**0.5) / 2 / delta) ** 0.5 * root / rows.double().abs().flatten()
    torch.testing.assert_close(weights, expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


@by_both
def test_continuous_where_the_ridge_begins(solve):
    # |β|² = n/δ at a cosine of −1 + δ: to both sides the weights differ by no more than their Gramians do.
    delta = torch.finfo(torch.float64).eps ** 0.5
    cosines = [-1 + delta * (1 + 1e-4), -1 + delta, -1 + delta * (1 - 1e-4)]
    found = [solve(torch.tensor([[1, c], [c, 1]], dtype=torch.float64)) for c in cosines]
    for weights in found:
        torch.testing.assert_close(weights, found[1], rtol=1e-4, atol=0)
    assert found[0][0] < found[1][0] < found[2][0]


@by_both
@pytest.mark.parametrize("kind", ["solution", "none"])
def test_any_scale_that_the_dtype_holds(solve, kind, device):
    rows = torch.tensor([[4.0, -1.0, 2.0], [-1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    if kind == "none":
        rows[2] = -rows[0] - rows[1]
    gramian = (rows @ rows.T).to(device)  # small whole numbers: exact down to the subnormal ones
    for dtype, lowest, highest in ((torch.float32, -149, 122), (torch.float64, -1074, 1018)):
        expected = solve(gramian.to(dtype))
        for exponent in (lowest, lowest // 2, -60, 60, highest // 2, highest):
            scaled = torch.ldexp(
                gramian, torch.tensor(exponent // 2)
            )  # in two steps: 2^exponent may overflow
            scaled = torch.ldexp(scaled, torch.tensor(exponent - exponent // 2)).to(dtype)
            assert scaled.isfinite().all()
            assert (scaled != 0).all()
            torch.testing.assert_close(solve(scaled), expected, rtol=1e-6, atol=0)


@by_both
def test_gradients_of_very_different_scales(solve, device):
    # C does not change, so β does not.
    rows = torch.tensor([[1.0, 0.2], [-0.5, 1.0], [0.7, 0.1]], dtype=torch.float64, device=device)
    scales = torch.tensor([1e-120, 1.0, 1e120], dtype=torch.float64, device=device)
    beta = solve(rows @ rows.T) * rows.norm(dim=1)
    scaled = rows * scales.unsqueeze(1)
    found = solve(scaled @ scaled.T) * rows.norm(dim=1) * scales
    torch.testing.assert_close(found / found[0], beta / beta[0], rtol=1e-9, atol=0)


@by_both
@pytest.mark.parametrize("rubbish", [-1.0, 1e300, float("inf"), float("nan")])
def test_absent_and_zero_gradients_are_left_out(solve, rubbish, device):
    active = torch.tensor([True, False, True, True, False])
    gramian = torch.zeros(5, 5, dtype=torch.float64)
    gramian[active.outer(active)] = random_gramian(3, 2, seed=0).flatten()
    gramian[1] = gramian[:, 1] = rubbish
    present = torch.tensor([True, False, True, True, True], device=device)  # cluster 4: a zero gradient
    weights = solve(gramian.to(device), present)
    assert weights[~active.to(device)].tolist() == [0, 0]
    expected = solve(random_gramian(3, 2, seed=0).to(device))
    torch.testing.assert_close(weights[active.to(device)], expected, rtol=1e-14, atol=0)


@by_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [2, 3, 8, 64])
def test_singular_gramians_give_a_bounded_step(solve, k, dtype, device):
    # Exactly opposed and exactly equal gradients: no solution in exact arithmetic, a finite one up to rounding.
    jacobian = torch.randn(k, 3, generator=torch.Generator().manual_seed(k), dtype=dtype)
    jacobian[1] = -2 * jacobian[0]
    jacobian[-1] = jacobian[0] if k > 2 else jacobian[-1]
    gramian = (jacobian @ jacobian.T).to(device)
    weights = solve(gramian).cpu().double()
    assert weights.isfinite().all()
    assert (weights > 0).all()
    # ‖Σ α_k g_k‖² ≤ K ‖G‖_F holds for the exact solution, and with a ridge.
    length = (weights @ jacobian.double()).norm() ** 2 / (k * gramian.cpu().double().norm())
    assert length < 1.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_overflowed_gradients_are_not_hidden(value, device):
    gramian = torch.eye(3, device=device)
    gramian[1, 1] = value
    assert ops.nash_weights(gramian).isnan().all()
    assert ops.nash_weights(torch.eye(3, device=device).fill_diagonal_(3e38)).isfinite().all()
    gramian = torch.eye(3, device=device)
    gramian[0, 1] = gramian[1, 0] = value
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
