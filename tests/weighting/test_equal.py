"""Equal weights: the mean of the present losses."""

from __future__ import annotations

import pytest
import torch

import diffmtl_fast as dm


def test_equal_is_the_mean_of_the_present_losses(device):
    losses = torch.tensor([1.0, 5.0, 3.0], device=device, requires_grad=True)
    assert dm.Equal()(losses).item() == 3
    dm.Equal()(losses, torch.tensor([True, False, True], device=device)).backward()
    assert losses.grad.tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.zeros(2, 2), ValueError, r"\[K\], found \[2, 2\]"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "found torch.int64"),
    ],
)
def test_equal_refuses(losses, error, message):
    with pytest.raises(error, match=message):
        dm.Equal()(losses)
