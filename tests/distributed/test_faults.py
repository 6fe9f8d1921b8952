"""Ranks that differ, fail, stall or die: what the others are told, and when."""

from __future__ import annotations

import pytest
import torch
from programs import K, assert_exact, differ, expected, make_model, no_samples, refused, stumble, train
from ranks import Failed

import diffmtl_fast as dm


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "num_clusters",
            f"expected the same num_clusters on every rank, found {K} on rank 0; {K + 1} on rank 1",
        ),
        ("weighting", "expected the same weighting on every rank, found PCGrad on rank 0; NashMTL on rank 1"),
        ("width", "expected the same number of parameters on every rank, found "),
        ("frozen", "expected the same trainable parameters on every rank, found 12 on rank 0; 11 on rank 1"),
        ("jacobian_dtype", "found None on rank 0; torch.bfloat16 on rank 1"),
        ("measure_gramian", "measure_gramian), found 0 on rank 0, 1 on rank 1"),
        ("scale", "for the scale of the GradScaler, found 4 on rank 0, 2 on rank 1"),
    ],
)
def test_ranks_that_differ_are_told(on_ranks, kind, message):
    for error in on_ranks(2, differ, kind):
        assert error.startswith("ValueError: expected the same")
        assert message in error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "lean",
            "ValueError: memory='lean': expected one process, or samples of one cluster in each, found several",
        ),
        ("sparse", "ValueError: model: expected dense gradients, found a sparse one"),
        ("around it", "TypeError: expected ClusteredMTL around the bare model, found it within Distributed"),
        (
            "around it, unused parameters",
            "TypeError: expected ClusteredMTL around the bare model, found it within",
        ),
        (
            "around a module with it",
            "TypeError: expected ClusteredMTL around the bare model, found it within",
        ),
        ("around one process", "TypeError: expected ClusteredMTL around the bare model, found it within"),
        ("group", "ValueError: process_group: expected a group that this process belongs to"),
    ],
)
def test_what_is_refused(on_ranks, kind, message):
    for error in on_ranks(2, refused, kind):
        assert error.startswith(message), error


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("error in forward", "ValueError: a bad sample"),
        ("error in backward", "RuntimeError: no such gradient"),
        ("a loss for each element", "ValueError: loss: expected per-sample losses of shape"),
    ],
)
def test_a_rank_that_fails_makes_all_fail_and_the_next_step_works(on_ranks, kind, own, weighting):
    found = on_ranks(4, stumble, kind, 2, weighting, again=True)
    for rank, (error, took, after) in enumerate(found):
        assert error.startswith(own if rank == 2 else "RuntimeError: expected a step of all ranks, found"), (
            error
        )
        assert f"rank 2: {own}" in error or rank == 2
        assert took < 10
        for name, grad in expected("sorted", 4, weighting).grads.items():
            assert name == "unused" or (after[name].flatten() - grad).abs().max() <= 1e-5


def test_a_rank_without_memory_for_its_jacobian_makes_all_fail(on_ranks):
    own = "OutOfMemoryError: no room for the Jacobian"
    (error, _, _), (other, took, _) = on_ranks(2, stumble, "no memory", 0)
    assert error == own
    assert f"rank 0: {own}" in other
    assert took < 10


def test_a_rank_whose_model_is_refused_makes_all_fail(on_ranks):
    (refusing, _, _), (other, _, _) = on_ranks(2, stumble, "mixed samples", 0)
    assert refusing.startswith("ValueError: model: expected each sample's output to depend on that sample")
    assert "found that some failed in it: rank 0: ValueError: model: expected each sample's output" in other


@pytest.mark.parametrize(("ranks", "dead", "kind"), [(2, 1, "death in backward"), (4, 3, "death")])
def test_a_rank_that_dies_ends_the_others_by_name(fresh_pool, ranks, dead, kind):
    for rank, found in enumerate(fresh_pool(ranks, timeout=20).results(stumble, kind, dead)):
        if rank == dead:
            assert found is None
        else:
            error, took, _ = found
            assert error.startswith(
                f"RuntimeError: rank {rank} of {ranks}: expected every rank to take part in"
            )
            assert f"found that rank {dead} has died" in error
            assert took < 6


def test_a_rank_that_stalls_ends_the_others_within_the_timeout(fresh_pool):
    waiting, late = fresh_pool(2, timeout=3).results(stumble, "sleep", 1)
    assert waiting[0].startswith(
        "RuntimeError: rank 0 of 2: expected every rank to take part in the exchange"
    )
    assert "found that rank 1 has died, has not come within the process group's timeout" in waiting[0]
    assert waiting[1] < 7
    assert isinstance(late, Failed) or late[0].startswith("RuntimeError: rank 1 of 2")


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_ranks_without_samples(on_ranks, weighting):
    members = [[0, 1, 4, 2, 2], []]
    assert_exact(on_ranks(2, train, members, weighting), expected(members, 2, weighting), 1e-5)


def test_no_samples_at_all(on_ranks):
    for error in on_ranks(2, no_samples):
        assert error == "loss: expected samples on some rank, found none on any"


def test_one_process_needs_samples():
    mtl = dm.ClusteredMTL(make_model(torch.float32), K, dm.Equal())
    with pytest.raises(
        ValueError, match="expected per-sample losses, found None, which is for one of several"
    ):
        mtl.backward(None)
