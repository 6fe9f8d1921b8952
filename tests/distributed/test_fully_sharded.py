"""Steps of several processes with a fully sharded model are the step of one process with all of their samples."""

from __future__ import annotations

import pytest
import torch
from fully_sharded_programs import (
    bytes_of_steps,
    clipped,
    differentiate_otherwise,
    forwards_that_share_a_backward,
    mixing,
    refuse_a_buffer,
    refused,
    train,
    train_alone_in_the_mesh,
    train_for_some_time,
)
from programs import LAYOUTS, K, assert_exact, expected, relative
from programs import train_for_some_time as train_alone

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
UNEQUAL = "unequal and unsorted"
#: of every rank, the clusters of its samples: one, or at most two
ONE_EACH = [[2] * 6, [0] * 4, [4] * 5, [2] * 3]
ALL_THE_SAME = [[3] * 4, [3] * 2, [3] * 5, [3] * 3]
TWO_EACH = [[0, 2, 0, 2], [4, 4, 1], [3, 3, 3], [1, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", ["equal", "uw", "pcgrad", "nash"])
def test_two_ranks(on_ranks, weighting, layout):
    for dtype, tolerance in TOLERANCE.items():
        found = on_ranks(2, train, layout, weighting, dtype)
        assert_exact(found, expected(layout, 2, weighting, dtype), tolerance)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighting", ["uw", "pcgrad", "nash"])
def test_four_ranks(on_ranks, weighting, layout, kind):
    found = on_ranks(4, train, layout, weighting, kind=kind)
    assert_exact(found, expected(layout, 4, weighting), 1e-5)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
@pytest.mark.parametrize("layout", [ONE_EACH, ALL_THE_SAME, TWO_EACH])
@pytest.mark.parametrize("weighting", ["equal", "uw", "pcgrad", "nash"])
def test_ranks_of_one_or_two_clusters(on_ranks, weighting, layout, kind):
    found = on_ranks(4, train, layout, weighting, kind=kind, backwards=2)
    assert_exact(found, expected(layout, 4, weighting, backwards=2), 1e-5)
    if weighting in ("pcgrad", "nash"):
        passes = max(len(set(clusters)) for clusters in layout)
        assert any(f"{passes} forward and backward passes" in line for line in found[0].messages)


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_replicas_of_a_mesh_start_alike(on_ranks, weighting):
    found = on_ranks(4, train, UNEQUAL, weighting, torch.float64, kind="hsdp", seeds=[0, 0, 7, 8])
    assert_exact(found, expected(UNEQUAL, 4, weighting, torch.float64), 1e-9)


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
@pytest.mark.parametrize("options", [{"reshard_after_forward": False}, {"reshard_after_forward": True}])
def test_backwards_accumulate(on_ranks, weighting, options):
    found = on_ranks(2, train, UNEQUAL, weighting, torch.float64, backwards=3, **options)
    assert_exact(found, expected(UNEQUAL, 2, weighting, torch.float64, backwards=3), 1e-9)


@pytest.mark.parametrize("weighting", ["uw", "equal"])
def test_measured_gramian_of_weightings_of_losses(on_ranks, weighting):
    found = on_ranks(2, train, UNEQUAL, weighting, torch.float64, measure=True)
    assert found[0].gramian is not None
    assert_exact(found, expected(UNEQUAL, 2, weighting, torch.float64), 1e-9)


@pytest.mark.parametrize("layout", [UNEQUAL, ONE_EACH[:2]])
@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_mixed_precision(on_ranks, weighting, layout):
    wanted = expected(layout, 2, weighting)
    found = on_ranks(2, train, layout, weighting, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert_exact(found, wanted, 0.05)
    assert relative(found[0].losses, wanted.losses) > 1e-6


def test_jacobian_in_bfloat16(on_ranks):
    found = on_ranks(2, train, UNEQUAL, "pcgrad", mtl_options={"jacobian_dtype": torch.bfloat16})
    assert_exact(found, expected(UNEQUAL, 2, "pcgrad"), 0.01)
    assert relative(found[0].gramian, expected(UNEQUAL, 2, "pcgrad").gramian) > 1e-6


@pytest.mark.parametrize("weighting", ["uw", "pcgrad", "seldom nash"])
def test_training_keeps_ranks_in_step(on_ranks, weighting):
    found = on_ranks(2, train_for_some_time, weighting, 8)
    alone = train_alone(weighting, 8, ranks=2)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        if name == "scale":
            continue
        assert (value - alone[name]).abs().max() <= 1e-6 * alone[name].abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_scalers_decide_alike(on_ranks, weighting):
    """Rank 1 alone overflows in step 1."""
    found = on_ranks(2, train_for_some_time, weighting, 3, overflow=1)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert value.isfinite().all(), name
    assert found[0]["scale"] == 2.0**10 / 2


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-12), (True, 1e-2)])
def test_forwards_may_share_a_backward(on_ranks, autocast, tolerance):
    wanted = on_ranks(2, forwards_that_share_a_backward, False, autocast)[0]
    found = on_ranks(2, forwards_that_share_a_backward, True, autocast)
    for name, grad in wanted.items():
        mine, theirs = (each[name] for each in found)
        assert (mine is None) == (theirs is None) == (grad is None), name
        if grad is not None:
            assert torch.equal(mine, theirs), name
            assert (mine - grad).abs().max() <= tolerance * grad.abs().max().clamp(min=1e-6), name


def test_models_that_update_buffers_are_refused(on_ranks):
    for error in on_ranks(2, refuse_a_buffer):
        assert error.startswith(
            "model: expected buffers that a forward leaves as they are, found 'calls' updated"
        )


def test_the_norm_clips(on_ranks):
    wanted = expected(UNEQUAL, 2, "pcgrad", torch.float64)
    for norm, theirs, clipped_norm in on_ranks(2, clipped, UNEQUAL):
        assert relative(norm, wanted.grad_norm) <= 1e-9
        assert relative(theirs, wanted.grad_norm) <= 1e-9
        assert abs(float(clipped_norm) / float(norm) - 0.5) <= 1e-5  # PyTorch adds 1e-6


def test_a_mesh_of_one(on_ranks):
    for rank, found in enumerate(on_ranks(2, train_alone_in_the_mesh)):
        assert_exact([found], expected([LAYOUTS["sorted"][rank]], 1, "pcgrad", torch.float64), 1e-9)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes(on_ranks, ranks):
    for plain, by_cluster, parallel in on_ranks(ranks, bytes_of_steps, ONE_EACH[:ranks]):
        assert plain["reduce"] > 0
        assert by_cluster["reduce"] <= 1.02 * K * plain["reduce"]
        assert by_cluster["gather"] <= 1.02 * K * plain["gather"]
        assert parallel["reduce"] <= 1.02 * plain["reduce"]
        assert sum(parallel.values()) <= 1.02 * sum(plain.values())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "grouped",
            "ValueError: engine='grouped': expected a model that is not sharded, found one in fully_shard",
        ),
        ("lean", "ValueError: memory='lean': expected a model that is not sharded, found one in fully_shard"),
        (
            "tensor parallel",
            "ValueError: model: expected a whole replica on every rank, found sharded parameters: ",
        ),
        (
            "both",
            "ValueError: model: expected parameters that fully_shard alone has sharded, all on one mesh",
        ),
        (
            "ignored",
            "ValueError: model: expected every trainable parameter sharded by fully_shard, found 'gain'",
        ),
        (
            "afterwards",
            "ValueError: model: expected a whole replica on every rank, found sharded parameters: ",
        ),
        (
            "around it",
            "TypeError: expected ClusteredMTL around the sharded model, found fully_shard around Clu",
        ),
        (
            "group",
            "ValueError: process_group: expected the processes of the sharded model's mesh, 2, found 4",
        ),
        (
            "no sync",
            "RuntimeError: model: expected FSDP2 to reduce gradients in every backward, found that it",
        ),
        (
            "accumulated",
            "ValueError: no_sync(): expected a model that is not sharded, found one in fully_shard",
        ),
        ("without samples", "ValueError: loss: expected per-sample losses, found None, with a fully sharded"),
    ],
)
def test_what_is_refused(on_ranks, kind, message):
    for error in on_ranks(4, refused, kind):
        assert error.startswith(message), error


def test_models_that_mix_samples_are_refused_on_all_ranks(on_ranks):
    (refusing, other) = on_ranks(2, mixing)
    assert refusing.startswith(
        "ValueError: model: expected each sample's output to depend on that sample's rows"
    )
    assert other.startswith(
        "RuntimeError: expected a step of all ranks, found that some failed in it: rank 0: Val"
    )


def test_other_backwards_are_refused(on_ranks):
    for error in on_ranks(2, differentiate_otherwise):
        assert error.startswith(
            "RuntimeError: expected mtl.backward(loss) after a forward with cluster=... of a f"
        )
