"""Names and shapes that other libraries' training scripts give to `denoising_loss`."""

from __future__ import annotations

import pytest
import torch

from diffmtl_fast.ops import denoising_loss


def inputs():
    torch.manual_seed(0)
    return torch.randn(3, 3, 2, 4, 4, dtype=torch.float64).unbind(0)


def test_names_of_diffusers_and_coefficients_that_broadcast():
    pred, x0, noise = inputs()
    alpha, sigma = torch.rand(2, 3, 1, 1, 1, dtype=torch.float64)
    target = alpha * noise - sigma * x0
    found = denoising_loss(pred, x0, noise, prediction="v_prediction", alpha=alpha, sigma=sigma)
    torch.testing.assert_close(found, (pred - target).square().flatten(1).mean(1))
    found = denoising_loss(pred, x0, noise, prediction="sample")
    torch.testing.assert_close(found, (pred - x0).square().flatten(1).mean(1))


@pytest.mark.parametrize(("data_at", "sign"), [(0, 1), (1, -1)])
def test_velocity_points_away_from_the_data(data_at, sign):
    pred, x0, noise = inputs()
    found = denoising_loss(pred, x0, noise, prediction="velocity", data_at=data_at)
    torch.testing.assert_close(found, (pred - sign * (noise - x0)).square().flatten(1).mean(1))


def test_times_of_what_has_none_are_refused():
    pred, x0, noise = inputs()
    with pytest.raises(ValueError, match="data_at: expected 0 for prediction 'epsilon'"):
        denoising_loss(pred, x0, noise, prediction="epsilon", data_at=1)
    with pytest.raises(ValueError, match="data_at: expected 0 or 1"):
        denoising_loss(pred, x0, noise, prediction="velocity", data_at=2)
    wrong = torch.rand(3, 2, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="alpha: expected shape"):
        denoising_loss(pred, x0, noise, prediction="v", alpha=wrong, sigma=wrong)
