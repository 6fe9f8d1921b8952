"""Backwards within `no_sync` and the one after them are the step of one process with all of their samples."""

from __future__ import annotations

import pytest
import torch
from programs import (
    LAYOUTS,
    PARALLEL,
    K,
    assert_exact,
    batches,
    expected,
    make_model,
    make_weighting,
    outcome,
    step,
    train,
)

import diffmtl_fast as dm

WIDTH = 300


@pytest.mark.parametrize("weighting", ["equal", "uw", "pcgrad", "nash"])
@pytest.mark.parametrize("members", [LAYOUTS["absent on ranks"], PARALLEL["one"]], ids=["mixed", "parallel"])
def test_batches_are_weighed_as_one(on_ranks, members, weighting):
    for ranks in (2, 4):
        found = on_ranks(ranks, train, members[:ranks], weighting, backwards=3, accumulate=True)
        wanted = expected(members[:ranks], ranks, weighting, backwards=3, accumulate=True)
        assert_exact(found, wanted, 1e-5)


@pytest.mark.parametrize("options", [{"engine": "sliced"}, {"memory": "lean"}], ids=["sliced", "lean"])
def test_settings(on_ranks, options):
    members = PARALLEL["one"][:2] if "memory" in options else LAYOUTS["sorted"][:2]
    found = on_ranks(2, train, members, "pcgrad", torch.float64, [options], backwards=2, accumulate=True)
    assert_exact(found, expected(members, 2, "pcgrad", torch.float64, backwards=2, accumulate=True), 1e-9)


def test_a_grad_scaler_goes_with_it(on_ranks):
    members = LAYOUTS["absent on ranks"][:2]
    found = on_ranks(2, train, members, "nash", backwards=2, accumulate=True, scaled=True)
    assert_exact(found, expected(members, 2, "nash", backwards=2, accumulate=True), 1e-5)


def test_bytes_are_those_of_one_backward(on_ranks):
    members = PARALLEL["one"][:2]
    found = on_ranks(2, train, members, "pcgrad", backwards=3, width=WIDTH, accumulate=True)
    trained = sum(p.numel() for p in make_model(torch.float32, width=WIDTH).parameters() if p.requires_grad)
    for each in found:
        assert 0.95 < each.bytes_sent / (4 * trained) <= 1.02


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
@pytest.mark.parametrize("engine", ["grouped", "sliced"])
def test_one_process(engine, weighting):
    mtl = dm.ClusteredMTL(make_model(torch.float64), K, make_weighting(weighting).double(), engine=engine)
    for _ in range(2):
        mtl.zero_grad()
        mtl.weighting.zero_grad()
        first, second = batches("absent on ranks", 2, torch.float64)
        with mtl.no_sync():
            step(mtl, first)
        assert all(p.grad is None for p in mtl.module.parameters())
        step(mtl, second)
        wanted = expected("absent on ranks", 2, weighting, torch.float64)
        assert_exact([outcome(mtl)], wanted, 1e-9)


def test_a_backward_that_failed_ends_the_step():
    mtl = dm.ClusteredMTL(make_model(torch.float32), K, dm.PCGrad())
    first, second = batches("sorted", 2, torch.float32)

    def fail(gradient):
        raise RuntimeError("no such gradient")

    with mtl.no_sync():
        output = mtl(first.x, first.t, cluster=first.cluster)
        output.register_hook(fail)
        with pytest.raises(RuntimeError, match="no such gradient"):
            mtl.backward(dm.ops.sample_mse(output, first.target))
    with pytest.raises(
        RuntimeError, match="expected all backwards of a step to succeed, found an error: Runtime"
    ):
        step(mtl, second)
    step(mtl, second)
    assert_exact([outcome(mtl)], expected([second.cluster.tolist()], 1, "pcgrad"), float("inf"))


def test_what_is_refused():
    first, second = batches("sorted", 2, torch.float32)
    mtl = dm.ClusteredMTL(make_model(torch.float32), K, dm.PCGrad(), memory="lean")
    with mtl.no_sync(), pytest.raises(ValueError, match=r"memory='lean': expected no no_sync\(\), found it"):
        step(mtl, first)
    mtl = dm.ClusteredMTL(make_model(torch.float32), K, dm.Equal())
    output = mtl(first.x, first.t, cluster=first.cluster)
    with mtl.no_sync(), pytest.raises(RuntimeError, match="expected the forward within no_sync"):
        mtl.backward(dm.ops.sample_mse(output, first.target))
    with mtl.no_sync():
        step(mtl, first)
    with pytest.raises(ValueError, match="scaler: expected one in all backwards of a step or in none"):
        step(mtl, second, scaler=torch.amp.GradScaler("cpu"))
