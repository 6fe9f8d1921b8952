"""Steps of several processes are the step of one process with all of their samples."""

from __future__ import annotations

import pytest
import torch
from programs import (
    LAYOUTS,
    assert_exact,
    clipped,
    copies,
    expected,
    relative,
    train,
    train_for_some_time,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
GROUPED, SLICED = {"engine": "grouped"}, {"engine": "sliced"}
UNEQUAL = "unequal and unsorted"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", ["equal", "uw"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_weightings_of_losses(on_ranks, ranks, weighting, layout):
    for dtype, tolerance in TOLERANCE.items():
        found = on_ranks(ranks, train, layout, weighting, dtype)
        assert_exact(found, expected(layout, ranks, weighting, dtype), tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", ["pcgrad", "nash"])
@pytest.mark.parametrize(
    "options", [[GROUPED], [SLICED], [GROUPED, SLICED]], ids=["grouped", "sliced", "one of each"]
)
def test_weightings_of_gradients(on_ranks, options, weighting, layout):
    for dtype, tolerance in TOLERANCE.items():
        found = on_ranks(2, train, layout, weighting, dtype, options)
        assert_exact(found, expected(layout, 2, weighting, dtype), tolerance)


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_buckets(on_ranks, layout, weighting):
    found = on_ranks(4, train, layout, weighting, torch.float64, [GROUPED, SLICED], bucket=5000)
    assert_exact(found, expected(layout, 4, weighting, torch.float64), 1e-9)


@pytest.mark.parametrize("weighting", ["uw", "pcgrad", "nash"])
@pytest.mark.parametrize("layout", [UNEQUAL, "absent on ranks"])
def test_backwards_accumulate(on_ranks, layout, weighting):
    found = on_ranks(2, train, layout, weighting, torch.float64, backwards=3)
    assert_exact(found, expected(layout, 2, weighting, torch.float64, backwards=3), 1e-9)


@pytest.mark.parametrize("weighting", ["uw", "equal"])
def test_measured_gramian_of_weightings_of_losses(on_ranks, weighting):
    found = on_ranks(2, train, UNEQUAL, weighting, torch.float64, measure=True)
    assert found[0].gramian is not None
    assert_exact(found, expected(UNEQUAL, 2, weighting, torch.float64), 1e-9)


def test_compiled_models(on_ranks):
    found = on_ranks(2, train, UNEQUAL, "pcgrad", torch.float64, wrap="compile")
    for each in found:
        assert any("compiled engine" in message for message in each.messages)
        each.grads = {name.removeprefix("_orig_mod."): grad for name, grad in each.grads.items()}
    assert_exact(found, expected(UNEQUAL, 2, "pcgrad", torch.float64), 1e-9)


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_models_in_distributed_data_parallel_are_taken_out(on_ranks, weighting):
    found = on_ranks(2, train, UNEQUAL, weighting, torch.float64, wrap="DistributedDataParallel", backwards=2)
    for each in found:
        assert sum("took the model out of DistributedDataParallel" in line for line in each.messages) == 1
    assert_exact(found, expected(UNEQUAL, 2, weighting, torch.float64, backwards=2), 1e-9)


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_models_start_as_rank_0s(on_ranks, weighting):
    found = on_ranks(2, train, UNEQUAL, weighting, torch.float64, seeds=[0, 5])
    assert_exact(found, expected(UNEQUAL, 2, weighting, torch.float64), 1e-9)


def test_weights_are_rank_0s_where_generators_differ(on_ranks):
    found = on_ranks(2, train, UNEQUAL, "random pcgrad", torch.float64, backwards=4)
    wanted = expected(UNEQUAL, 2, "random pcgrad", torch.float64, backwards=4)  # with rank 0's generator
    assert_exact(found, wanted, 1e-9)


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_autocast(on_ranks, weighting):
    found = on_ranks(2, train, UNEQUAL, weighting, autocast=True)
    assert_exact(found, expected(UNEQUAL, 2, weighting), 0.05)


def test_jacobian_in_bfloat16(on_ranks):
    found = on_ranks(2, train, UNEQUAL, "pcgrad", options=[{"jacobian_dtype": torch.bfloat16}])
    assert_exact(found, expected(UNEQUAL, 2, "pcgrad"), 0.01)
    assert relative(found[0].gramian, expected(UNEQUAL, 2, "pcgrad").gramian) > 1e-6


@pytest.mark.parametrize("weighting", ["uw", "pcgrad", "seldom nash"])
def test_training_keeps_ranks_in_step(on_ranks, weighting):
    found = on_ranks(2, train_for_some_time, weighting, 12)
    (alone,) = [train_for_some_time(weighting, 12, ranks=2)]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert (value - alone[name]).abs().max() <= 1e-6 * alone[name].abs().max().clamp(min=1e-3), name


def test_copies_share_a_group_that_is_not_pickled(on_ranks):
    for grads, error in on_ranks(2, copies):
        assert error.startswith("process_group: expected none in what is pickled, found one")
        for other in grads[1:]:
            for name, grad in grads[0].items():
                assert grad is other[name] is None or torch.equal(grad, other[name]), name


def test_the_norm_clips(on_ranks):
    wanted = expected(UNEQUAL, 2, "pcgrad", torch.float64)
    for norm, theirs, clipped_norm in on_ranks(2, clipped, UNEQUAL):
        assert relative(norm, wanted.grad_norm) <= 1e-9
        assert relative(theirs, wanted.grad_norm) <= 1e-9
        assert abs(float(clipped_norm) / float(norm) - 0.5) <= 1e-5  # PyTorch adds 1e-6


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_scalers_decide_alike(on_ranks, weighting):
    """Rank 1 alone overflows in step 1."""
    found = on_ranks(2, train_for_some_time, weighting, 3, overflow=(1, 1))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert found[0]["scale"] == 2.0**10 / 2
    assert found[0]["steps taken"] == 2
