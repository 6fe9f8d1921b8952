"""What the ranks exchange is what is said in docs/distributed.md."""

from __future__ import annotations

import pytest
import torch
from programs import K, alone_in_a_group, assert_exact, bytes_of_a_forward, expected, make_model, train

WIDTH = 300


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("weighting", "options", "limit"),
    [
        ("uw", {}, 1.02),
        ("pcgrad", {"engine": "grouped"}, 1.02 * (K + 1) / 2),
        ("pcgrad", {"engine": "sliced"}, 1.02 * (K + 1) / 2),
        ("pcgrad", {"jacobian_dtype": torch.bfloat16}, 1.02 * (K / 2 + 1) / 2),
    ],
)
def test_bytes_of_a_step(on_ranks, ranks, weighting, options, limit):
    found = on_ranks(ranks, train, "sorted", weighting, options=[options], backwards=2, width=WIDTH)
    trained = sum(p.numel() for p in make_model(torch.float32, width=WIDTH).parameters() if p.requires_grad)
    of_ddp = 2 * (ranks - 1) / ranks * 4 * trained  # an all-reduce of the gradients
    for each in found:
        assert limit / 1.1 < each.bytes_sent / of_ddp <= limit


def test_forwards_and_checks_exchange_nothing(on_ranks):
    assert on_ranks(2, bytes_of_a_forward) == [0, 0]


def test_a_group_of_one_exchanges_nothing(on_ranks):
    (sent, found), (others, _) = on_ranks(2, alone_in_a_group)
    assert sent == others == 0
    assert_exact([found], expected("sorted", 1, "pcgrad", torch.float64), 1e-9)
