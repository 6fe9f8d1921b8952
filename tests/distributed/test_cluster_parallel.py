"""Ranks with samples of few clusters send the gradients of these alone, and find the same update."""

from __future__ import annotations

import pytest
import torch
from programs import PARALLEL, K, assert_exact, expected, make_model, mixing_model, train

WIDTH = 300


@pytest.mark.parametrize("layout", PARALLEL)
@pytest.mark.parametrize("weighting", ["equal", "uw", "pcgrad", "nash"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_update_is_that_of_one_process(on_ranks, ranks, weighting, layout):
    members = PARALLEL[layout][:ranks]
    found = on_ranks(ranks, train, members, weighting)
    assert_exact(found, expected(members, ranks, weighting), 1e-5)


@pytest.mark.parametrize("options", [{"memory": "lean"}, {"engine": "sliced"}], ids=["lean", "sliced"])
def test_settings(on_ranks, options):
    members = PARALLEL["one"][:2]
    found = on_ranks(2, train, members, "pcgrad", torch.float64, [options], backwards=2)
    assert_exact(found, expected(members, 2, "pcgrad", torch.float64, backwards=2), 1e-9)


def test_compiled_models_run_as_they_are(on_ranks):
    members = PARALLEL["one"][:2]
    found = on_ranks(2, train, members, "pcgrad", torch.float64, wrap="compile")
    for each in found:
        assert not any("engine" in message for message in each.messages)
        assert sum("cluster-parallel: no rank has samples of more than 1 of" in m for m in each.messages) == 1
        each.grads = {name.removeprefix("_orig_mod."): grad for name, grad in each.grads.items()}
    assert_exact(found, expected(members, 2, "pcgrad", torch.float64), 1e-9)


def test_models_that_mix_samples_run(on_ranks):
    first, second = on_ranks(2, mixing_model)
    assert torch.equal(first, second)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("clusters", "options", "limit"),
    [
        (1, {}, 1.02),
        (2, {}, 1.02 * 3 / 2),
        (1, {"jacobian_dtype": torch.bfloat16}, 1.02 * 3 / 4),
    ],
)
def test_bytes_of_a_step(on_ranks, ranks, clusters, options, limit):
    members = [[(rank + i) % K for i in range(clusters)] for rank in range(ranks)]
    found = on_ranks(ranks, train, members, "pcgrad", options=[options], backwards=2, width=WIDTH)
    trained = sum(p.numel() for p in make_model(torch.float32, width=WIDTH).parameters() if p.requires_grad)
    of_ddp = 2 * (ranks - 1) / ranks * 4 * trained
    for each in found:
        assert limit / 1.1 < each.bytes_sent / of_ddp <= limit
