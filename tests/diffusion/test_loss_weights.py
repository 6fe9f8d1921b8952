import math

import pytest
import torch

from diffmtl_fast.diffusion import min_snr_weight, p2_weight, predicted_weight

SNR = torch.tensor([0.0, 1e-3, 1.0, 5.0, 50.0, math.inf], dtype=torch.float64)


def test_min_snr():
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(min_snr_weight(SNR.log(), gamma=5), expected)


def test_p2():
    torch.testing.assert_close(p2_weight(SNR.log(), gamma=0.5, k=2.0), (2.0 + SNR) ** -0.5)


def test_dtype_and_shape_are_kept():
    log_snr = torch.randn(2, 3, dtype=torch.float32)
    for weight in (min_snr_weight(log_snr), p2_weight(log_snr)):
        assert (weight.shape, weight.dtype) == (log_snr.shape, torch.float32)


def test_bad_input():
    with pytest.raises(ValueError, match="gamma: expected a positive"):
        min_snr_weight(SNR, gamma=0)
    with pytest.raises(ValueError, match="k > 0"):
        p2_weight(SNR, k=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_has_the_same_loss(kind):
    alpha_square = torch.tensor([0.9999, 0.7, 0.5, 0.01], dtype=torch.float64)
    alpha, sigma = alpha_square.sqrt(), (1 - alpha_square).sqrt()
    log_snr = 2 * (alpha / sigma).log()
    x, noise, guess = torch.randn(3, 4, dtype=torch.float64)
    seen = alpha * x + sigma * noise
    guessed_noise = (seen - alpha * guess) / sigma
    error = {
        "epsilon": noise - guessed_noise,
        "sample": x - guess,
        "v_prediction": (alpha * noise - sigma * x) - (alpha * guessed_noise - sigma * guess),
    }[kind]
    weight = min_snr_weight(log_snr)
    found = predicted_weight(weight, log_snr, kind) * error.square()
    torch.testing.assert_close(found, weight * (noise - guessed_noise).square())


def test_min_snr_of_other_predictions():
    levels = SNR[:-1].log()
    weight = min_snr_weight(levels, gamma=5)
    torch.testing.assert_close(predicted_weight(weight, levels, "sample"), SNR[:-1].clamp(max=5.0))
    velocity = SNR[:-1].clamp(max=5.0) / (SNR[:-1] + 1)
    torch.testing.assert_close(predicted_weight(weight, levels, "v_prediction"), velocity)
    with pytest.raises(ValueError, match="prediction_type: expected"):
        predicted_weight(weight, levels, "flow")
