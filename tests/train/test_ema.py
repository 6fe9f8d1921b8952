"""The averaged weights, against the recursion written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffmtl_fast.train import checkpoint
from diffmtl_fast.train.ema import Ema, PowerEma, exponent, power_average, power_weights


def test_follows_with_a_decay_that_warms_up(device):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(device)
    ema = Ema(model, decay=0.3)
    expected = model[0].weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            model[0].weight.add_(1.0 + step)
            model[1].running_mean.add_(1.0)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        ema.update(model)
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_width_of_a_power_function(sigma_rel):
    """The standard deviation of p(τ) = (γ + 1) τ^γ on [0, 1], by its moments."""
    gamma = exponent(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.3])
def test_widths_that_no_power_function_has(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel: expected more than 0 and less than 0\.2887"):
        exponent(sigma_rel)


def walk(folder, widths, every, steps=200):
    """Weights that wander, their snapshots by time, and the same averages with other widths tracked directly."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    kept, tracked, snapshots = PowerEma(model, widths), PowerEma(model, OTHERS), {}
    for t in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64), alpha=t**-0.5)
            model[1].running_mean.fill_(t)
        kept.update(model)
        tracked.update(model)
        if t % every == 0:
            snapshots[t] = folder / f"{every}-{t}.safetensors"
            checkpoint.save_module(snapshots[t], kept.models)
    return model, kept, tracked, snapshots


OTHERS = (0.07, 0.1, 0.15)


def test_power_averages_of_any_width_from_those_of_two(tmp_path):
    """In float64, against the average tracked directly: exact of a kept one, nearer with more snapshots."""
    widths, errors = (0.05, 0.1), []
    for every in (50, 10):
        model, kept, tracked, snapshots = walk(tmp_path, widths, every)
        names = [name for name, _ in model.named_buffers()]
        for width, average in zip(widths, kept.models, strict=True):
            found = power_average(snapshots, widths, 200, width, names)
            torch.testing.assert_close(found["0.weight"], average[0].weight, rtol=1e-9, atol=1e-9)
            assert torch.equal(found["1.running_mean"], model[1].running_mean)
        found = [power_average(snapshots, widths, 200, width, names)["0.weight"] for width in OTHERS]
        wanted = [average[0].weight for average in tracked.models]
        spread = (model[0].weight.detach() - wanted[-1]).abs().max()
        errors.append(max(float((a - b).abs().max() / spread) for a, b in zip(found, wanted, strict=True)))
    assert errors[1] < 0.5 * errors[0] < 0.1
    with pytest.raises(ValueError, match="expected snapshots of iteration 5 or earlier, found none"):
        power_average(snapshots, widths, 5, 0.1)


def test_weights_of_power_averages_are_the_least_squares_on_a_grid():
    times, gammas = np.array([40.0, 40.0, 100.0, 100.0]), np.array([6.94, 16.97] * 2)
    grid = (np.arange(200_000) + 0.5) / 2000

    def profile(t, gamma):
        return np.where(grid < t, (gamma + 1) * (grid / t) ** gamma / t, 0.0)

    columns = np.stack([profile(t, gamma) for t, gamma in zip(times, gammas, strict=True)], 1)
    expected = np.linalg.lstsq(columns, profile(100.0, 3.0), rcond=None)[0]
    np.testing.assert_allclose(power_weights(times, gammas, 100.0, 3.0), expected, rtol=1e-4, atol=1e-5)
