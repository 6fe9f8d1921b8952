import math

import pytest
import torch

from diffmtl_fast.diffusion import min_snr_weight, p2_weight

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
