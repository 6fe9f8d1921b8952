"""Buckets of gradients leave while the backward goes on, and what comes out does not depend on when."""

from __future__ import annotations

import pytest
import torch
from programs import LAYOUTS, PARALLEL, departures

from diffmtl_fast.distributed import Arrivals
from diffmtl_fast.distributed.buckets import Departures, Workspace, in_order_of_backward


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("sorted", {"weighting": "uw"}),
        ("sorted", {"options": [{"engine": "grouped"}]}),
        ("absent on ranks", {"options": [{"engine": "sliced"}, {"engine": "grouped"}]}),
        ("sorted", {"accumulate": True}),
        (PARALLEL["one"], {}),
    ],
    ids=["losses", "grouped", "one of each", "accumulated", "cluster-parallel"],
)
def test_buckets_leave_during_the_backward_with_the_same_bits(on_ranks, layout, options):
    members = (LAYOUTS[layout] if isinstance(layout, str) else layout)[:2]
    for (during, after), early, late in on_ranks(2, departures, members, **options):
        assert during > 0
        assert during + after >= 3
        for name, grad in late.grads.items():
            assert grad is None if early.grads[name] is None else torch.equal(early.grads[name], grad), name
        assert torch.equal(early.weights, late.weights)
        assert early.gramian is late.gramian is None or torch.equal(early.gramian, late.gramian)


def test_the_order_of_buckets_is_fixed():
    sent = []
    buckets = in_order_of_backward([(0, 20 << 20), (0, 20 << 20), (1, 10), (0, 1)])
    assert buckets == [[3, 1], [2], [0]]
    departures = Departures(buckets, sent.append)
    for position in (0, 1, 2):
        departures.complete(position)
        assert sent == []
    departures.complete(3)
    assert sent == buckets
    departures.flush()
    assert sent == buckets


def test_gradients_are_counted():
    complete = []
    arrivals = Arrivals({0: 2, 3: 0}, complete.append)
    assert complete == [3]
    for position in (0, 1, 0, 1):
        arrivals.note(position)
    assert complete == [3, 0]
    with pytest.raises(RuntimeError, match="parameter 0: expected the last use of a parameter to be known"):
        arrivals.note(0)


def test_memory_is_used_again():
    workspace, cpu = Workspace(), torch.device("cpu")
    first = workspace.take((3, 4), torch.float32, cpu)
    assert first.shape == (3, 4)
    workspace.give_back(first, torch.empty(0))
    second = workspace.take((40,), torch.bfloat16, cpu)
    assert second.dtype == torch.bfloat16
    assert (
        second.data_ptr() != first.data_ptr()
    )  # 80 bytes do not fit into 48, which nobody asks for any more
    workspace.give_back(second)
    assert workspace.take((10,), torch.float64, cpu).data_ptr() == second.data_ptr()
    assert workspace.take((10,), torch.float64, cpu).data_ptr() != second.data_ptr()
