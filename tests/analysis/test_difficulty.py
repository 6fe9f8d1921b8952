"""Task difficulty: curves whose convergence is known, Gaussians whose relative entropy is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from diffmtl_fast.analysis.difficulty import (
    GaussianFit,
    conditional_relative_entropy,
    convergence,
    gaussian_relative_entropy,
)
from diffmtl_fast.analysis.plots import plot_convergence, plot_relative_entropy
from diffmtl_fast.clustering import IntervalClustering, cluster_timesteps
from diffmtl_fast.diffusion.named_schedules import named_log_snr

PROCESSES = {
    "vp": lambda s: (np.sqrt(1 / (1 + np.exp(-s))), np.sqrt(1 / (1 + np.exp(s)))),
    "ve": lambda s: (np.ones_like(s), np.exp(-s / 2)),
    "flow": lambda s: (1 - 1 / (1 + np.exp(s / 2)), 1 / (1 + np.exp(s / 2))),
}
LEVELS = np.array([4.0, 2.5, 0.1, -1.0, -5.0])


def test_convergence_of_exponential_curves():
    """L = c + a e^(−s / τ): a tenth of the fall is left after τ ln 10 steps, whatever a and c."""
    steps = np.arange(0, 4001, 10.0)
    curves = np.stack([c + a * np.exp(-steps / tau) for a, c, tau in [(1, 0.5, 100), (7, 0, 300)]])
    found = convergence(cluster_timesteps(10, 2), steps, curves, reach=0)
    np.testing.assert_allclose(found.steps_to, np.log(10) * np.array([100, 300]), rtol=2e-3)
    np.testing.assert_allclose(found.remaining, np.exp(-steps / np.array([[100], [300]])), atol=2e-4)
    half = convergence(cluster_timesteps(10, 2), steps, curves, fraction=0.5, reach=0)
    np.testing.assert_allclose(half.steps_to, np.log(2) * np.array([100, 300]), rtol=5e-3)


def test_convergence_is_invariant_to_scale_and_offset():
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 5, 200))
    curve = 3 / np.arange(1, 201) + 0.01 * rng.random(200)
    found = convergence(cluster_timesteps(4, 2), steps, np.stack([curve, 5 * curve + 2]))
    np.testing.assert_allclose(found.remaining[0], found.remaining[1], atol=1e-12)
    assert found.steps_to[0] == pytest.approx(found.steps_to[1])


def test_a_loss_that_does_not_fall_has_no_convergence():
    steps = np.arange(1, 31)
    found = convergence(cluster_timesteps(4, 2), steps, np.stack([np.ones(30), 1 / steps]))
    assert np.isnan(found.steps_to[0])
    assert np.isnan(found.remaining[0]).all()
    assert np.isfinite(found.steps_to[1])


@pytest.mark.parametrize(
    ("steps", "losses", "options", "message"),
    [
        ([1], [[1]], {}, "steps: expected at least two increasing numbers"),
        ([1, 1], [[1, 2]], {}, "steps: expected at least two increasing numbers"),
        ([1, 2], [[1, 2], [1, 2]], {}, r"losses: expected finite numbers \[1, 2\], found shape \[2, 2\]"),
        ([1, 2], [[1, np.nan]], {}, "losses: expected finite numbers"),
        ([1, 2], [[2, 1]], {"fraction": 1.0}, "fraction: expected a number between 0 and 1, found 1.0"),
    ],
)
def test_bad_curves(steps, losses, options, message):
    with pytest.raises(ValueError, match=message):
        convergence(IntervalClustering(np.array([0, 4])), np.array(steps), np.array(losses), **options)


@pytest.mark.parametrize("points", [3, 40])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("rising", [False, True])
def test_gaussian_entropy_is_that_of_the_full_covariances(points, process, rising):
    """With three points in five dimensions the covariance is singular."""
    rng = np.random.default_rng(1)
    data = rng.standard_normal((points, 5)) @ rng.standard_normal((5, 5)) + [3, 0, -1, 0, 2]
    levels = LEVELS[::-1].copy() if rising else LEVELS
    alpha, sigma = PROCESSES[process](LEVELS)
    mean, covariance = data.mean(0), np.cov(data, rowvar=False, bias=True)
    marginals = [
        MultivariateNormal(torch.tensor(a * mean), torch.tensor(a**2 * covariance + s**2 * np.eye(5)))
        for a, s in zip(alpha, sigma, strict=True)
    ]
    expected = [float(kl_divergence(p, q)) / 5 for p, q in pairwise(marginals)]
    found = gaussian_relative_entropy(levels, GaussianFit.of(torch.tensor(data)), process)
    np.testing.assert_allclose(found, expected[::-1] if rising else expected, rtol=1e-9)


def test_conditional_entropy_is_the_published_formula():
    """½ [v' / v − 1 − ln(v' / v)] + (√ᾱ − √ᾱ')² ‖x_0‖² / (2 d v) with v = 1 − ᾱ."""
    alpha_bar = 1 / (1 + np.exp(-LEVELS))
    v, x = 1 - alpha_bar, np.array([1.0, -2.0, 0.5])
    ratio = v[:-1] / v[1:]
    expected = (ratio - 1 - np.log(ratio)) / 2 + np.diff(np.sqrt(alpha_bar)) ** 2 * (x @ x) / (6 * v[1:])
    np.testing.assert_allclose(conditional_relative_entropy(LEVELS, (x @ x) / 3), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_small_steps_in_extended_precision(name):
    """At T = 4000 the variances of neighbours differ by parts in 10⁸ at high noise."""
    levels = named_log_snr(name, 4000)
    s = levels.astype(np.longdouble)
    alpha, sigma = PROCESSES["vp"](s)
    for variance, mean_square in ((0.0, 0.7), (0.3, 0.0), (1.0, 0.1)):
        v = alpha**2 * variance + sigma**2
        change = ((alpha**2)[:-1] - (alpha**2)[1:]) * variance + (sigma**2)[:-1] - (sigma**2)[1:]
        x = change / v[1:]
        expected = (x - np.log1p(x) + np.diff(alpha) ** 2 * mean_square / v[1:]) / 2
        fit = GaussianFit(np.array([variance]), np.array([mean_square]), np.ones(1))
        found = gaussian_relative_entropy(levels, fit)
        np.testing.assert_allclose(found, expected.astype(float), rtol=1e-6, atol=1e-18)
        assert (found >= 0).all()


@given(
    variance=st.floats(0, 10), mean_square=st.floats(0, 10), process=st.sampled_from(sorted(PROCESSES)),
    low=st.floats(-12, 11), step=st.floats(1e-3, 5),
)  # fmt: skip
def test_the_conditional_entropy_bounds_the_marginal_one(variance, mean_square, process, low, step):
    levels = np.array([low + step, low])
    fit = GaussianFit(np.array([variance]), np.array([mean_square]), np.ones(1))
    marginal = gaussian_relative_entropy(levels, fit, process)
    conditional = conditional_relative_entropy(levels, variance + mean_square, process)
    assert 0 <= marginal[0] <= conditional[0] * (1 + 1e-9) + 1e-15


def test_the_gaussian_fit_keeps_mean_and_variance():
    data = torch.randn(6, 2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    fit = GaussianFit.of(data)
    flat = data.flatten(1).numpy()
    assert fit.counts.sum() == 12
    assert (fit.variances * fit.counts).sum() == pytest.approx(flat.var(0).sum())
    assert fit.mean_squares.sum() == pytest.approx(np.square(flat.mean(0)).sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conditional_relative_entropy(np.array([1.0]), 1.0), "log_snr: expected at least two finite"),
        (lambda: conditional_relative_entropy(np.array([1.0, 1.0]), 1.0), "strictly monotone"),
        (lambda: conditional_relative_entropy(np.array([np.inf, 1.0]), 1.0), "log_snr"),
        (lambda: conditional_relative_entropy(LEVELS, -1.0), r"mean_square: expected a number >= 0, found -1\.0"),
        (lambda: conditional_relative_entropy(LEVELS, 1.0, "sde"), "process: expected one of vp, ve"),
        (lambda: GaussianFit.of(np.zeros((1, 3))), "data: expected at least two finite points"),
        (lambda: GaussianFit.of(np.full((3, 3), np.nan)), "data: expected at least two finite points"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_pictures(tmp_path):
    steps = np.arange(1, 301, 3)
    curves = np.stack([1 / np.sqrt(steps), 0.1 + 1 / steps, np.ones(100)])
    found = convergence(cluster_timesteps(30, 3), steps, curves)
    plot_convergence(tmp_path / "convergence.png", found, "title")
    levels = named_log_snr("linear", 50)
    entropies = {"conditional": conditional_relative_entropy(levels, 0.5)}
    plot_relative_entropy(tmp_path / "entropy.png", entropies, levels, "title")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
