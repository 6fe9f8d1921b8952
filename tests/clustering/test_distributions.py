"""Distributions of noise levels against SciPy, numerical derivatives and their own inverses."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from diffmtl_fast.clustering import (
    BetaTime,
    LaplaceSigma,
    LaplaceTime,
    LogitNormalTime,
    LogNormalSigma,
    ShiftedTime,
    UniformTime,
)

ALL = [
    LogNormalSigma(0.3, 0.8),
    UniformTime(),
    ShiftedTime(2.5),
    ShiftedTime(0.4),
    LogitNormalTime(-0.4, 1.5),
    LaplaceSigma(0.5, 0.7),
    LaplaceTime(-1.0, 0.9),
    BetaTime(1.5, 1.0),
    BetaTime(0.4, 2.5),
]
P = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_density_is_the_derivative_of_the_cdf(distribution):
    level = distribution.quantile(P)
    step = 1e-5 * torch.minimum(level, (1 - level).abs() + 1e-3)
    slope = (distribution.cdf(level + step) - distribution.cdf(level - step)) / (2 * step)
    keep = (level - 0.0).abs() > 1e-6
    if isinstance(distribution, LaplaceSigma | LaplaceTime):  # it has a kink
        keep &= (distribution.log_snr(level) - distribution.mean).abs() > 1e-2
    torch.testing.assert_close(distribution.density(level)[keep], slope[keep], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_levels_and_log_snr_are_inverse(distribution):
    level = distribution.quantile(P)
    torch.testing.assert_close(distribution.at_log_snr(distribution.log_snr(level)), level)


@pytest.mark.parametrize("distribution", ALL, ids=str)
def test_ends(distribution):
    ends = distribution.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [0.0, np.inf if "Sigma" in type(distribution).__name__ else 1.0]
    assert distribution.cdf(ends).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("distribution", [LaplaceSigma(0.5, 0.7), LaplaceTime(-1.0, 0.9)], ids=str)
def test_laplace_is_laplace_in_log_snr(distribution):
    p = torch.tensor([1e-15, 1e-6, 0.2, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)
    expected = scipy.stats.laplace(distribution.mean, distribution.scale).isf(p.numpy())
    found = distribution.log_snr(distribution.quantile(p)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("a", "b"), [(0.1, 0.1), (0.1, 1000), (1000, 0.1), (1000, 1000), (1, 1), (1.5, 1), (0.5, 3), (20, 0.3)]
)
def test_quantile_of_the_beta_distribution(a, b):
    p = torch.sigmoid(torch.linspace(-41, 36, 999, dtype=torch.float64))  # all that a float64 draw can be
    expected = scipy.special.betaincinv(a, b, p.numpy())
    found = BetaTime(a, b).quantile(p)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)
    assert (found.diff() >= 0).all()
    assert BetaTime(a, b).quantile(p.float()).dtype == torch.float32


def test_beta_is_scipys(device):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, device=device)
    expected = scipy.stats.beta(1.7, 0.6)
    distribution = BetaTime(1.7, 0.6)
    np.testing.assert_allclose(distribution.cdf(t).cpu(), expected.cdf(t.cpu()), rtol=1e-12)
    np.testing.assert_allclose(distribution.density(t).cpu(), expected.pdf(t.cpu()), rtol=1e-12)
    assert distribution.cdf(t).device == t.device


def test_bad_input(monkeypatch):
    for kind in (LogNormalSigma, LogitNormalTime, LaplaceSigma, LaplaceTime):
        for bad in ((0.0, 0.0), (np.inf, 1.0), (0.0, np.nan), (0.0, np.inf)):
            with pytest.raises(ValueError, match=r"expected a finite mean and a positive (std|scale), found"):
                kind(*bad)
    for bad in ((0.0, 1.0), (1.0, 0.01), (np.nan, 1.0), (1.0, 1e6)):
        with pytest.raises(ValueError, match=r"expected a and b from 0\.1 to 1000, found a="):
            BetaTime(*bad)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"pip install 'diffmtl-fast\[train\]'"):
        BetaTime(2.0, 1.0)
