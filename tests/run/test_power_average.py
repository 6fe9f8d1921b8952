"""Power averages of any width, against those that training would have kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffmtl_fast.run.power_average import power_average, power_weights
from diffmtl_fast.train import checkpoint
from diffmtl_fast.train.ema import PowerEma


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
