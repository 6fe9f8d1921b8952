import copy
import json
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffmtl_fast.clustering import IntervalClustering

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def from_sizes(sizes, cost=1.5):
    return IntervalClustering(np.cumsum([0, *sizes]), cost)


@given(SIZES)
def test_assign_is_the_interval(sizes):
    clusters = from_sizes(sizes)
    t = torch.arange(sum(sizes))
    expected = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(clusters.assign(t).numpy(), expected)
    assert (clusters.k, clusters.num_timesteps, clusters.sizes.tolist()) == (len(sizes), sum(sizes), sizes)


def test_assign_keeps_shape_and_device(device):
    clusters = from_sizes([3, 4, 5])
    t = torch.tensor([[0, 2], [3, 11]], device=device, dtype=torch.int32)
    cluster = clusters.assign(t)
    assert cluster.tolist() == [[0, 0], [1, 2]]
    assert (cluster.dtype, cluster.device) == (torch.int64, t.device)
    assert clusters.assign(torch.empty(0, 2, dtype=torch.int64, device=device)).shape == (0, 2)


@pytest.mark.parametrize("t", [[-1], [0, 12], [2**40]])
def test_assign_refuses_timesteps_out_of_range(t):
    with pytest.raises(ValueError, match=f"expected 0 <= t < T = 12, found {t[-1]}"):
        from_sizes([3, 4, 5]).assign(torch.tensor(t))


@pytest.mark.parametrize("t", [torch.tensor([0.5]), torch.tensor([True])])
def test_assign_refuses_other_dtypes(t):
    with pytest.raises(TypeError, match="expected an integer tensor"):
        from_sizes([3, 4]).assign(t)


@pytest.mark.parametrize("t", [5, np.array([5])])
def test_assign_refuses_what_is_no_tensor(t):
    with pytest.raises(TypeError, match=f"t: expected an integer tensor, found {type(t).__name__}"):
        from_sizes([3, 4]).assign(t)


@given(SIZES, st.integers(1, 60), st.integers(0, 2**40))
def test_sample_is_stratified_and_deterministic(sizes, batch_size, seed):
    clusters = from_sizes(sizes)
    t, cluster = clusters.sample(batch_size, generator=torch.Generator().manual_seed(seed))
    assert t.dtype == cluster.dtype == torch.int64
    assert t.shape == cluster.shape == (batch_size,)
    assert torch.equal(clusters.assign(t), cluster)
    assert torch.equal(cluster, cluster.sort().values)
    counts = torch.bincount(cluster, minlength=clusters.k)
    assert counts.min() == batch_size // clusters.k
    assert counts.max() - counts.min() == (1 if batch_size % clusters.k else 0)
    again = clusters.sample(batch_size, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(t, again[0])
    assert torch.equal(cluster, again[1])


def test_sample_is_uniform_within_and_fair_between_clusters():
    clusters = from_sizes([2, 3, 5])
    generator = torch.Generator().manual_seed(0)
    draws = [clusters.sample(4, generator=generator) for _ in range(6000)]
    t, cluster = (torch.cat(parts) for parts in zip(*draws, strict=True))
    # Every cluster expects 4/3 of 4; within it every timestep is equally likely. Five standard deviations.
    frequency = torch.bincount(cluster, minlength=3) / len(cluster)
    torch.testing.assert_close(frequency, torch.full((3,), 1 / 3), atol=5 * (0.25 / 24000) ** 0.5, rtol=0)
    expected = torch.tensor([1 / 6] * 2 + [1 / 9] * 3 + [1 / 15] * 5)
    frequency = torch.bincount(t, minlength=10) / len(t)
    torch.testing.assert_close(frequency, expected, atol=5 * (0.14 / 24000) ** 0.5, rtol=0)


def test_sample_on_device(device):
    generator = torch.Generator(device).manual_seed(0)
    t, cluster = from_sizes([2, 3]).sample(7, generator=generator)
    assert t.device.type == cluster.device.type == torch.device(device).type


def test_nothing_waits_for_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("only a GPU can be waited for")
    clusters = from_sizes([2, 3, 4])
    generator = torch.Generator(device).manual_seed(0)
    clusters.sample(7, generator=generator)  # the boundaries are copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        t, _ = clusters.sample(7, generator=generator)
        clusters.assign(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch_size", [0, -3])
def test_sample_refuses_an_empty_batch(batch_size):
    with pytest.raises(ValueError, match=f"batch_size: expected at least 1, found {batch_size}"):
        from_sizes([2]).sample(batch_size)


@given(SIZES, st.floats(allow_infinity=False))
def test_dict_pickle_and_copy_round_trips(sizes, cost):
    clusters = from_sizes(sizes, cost)
    clusters.sample(3)  # fills the tensor cache, which must not travel
    copies = [
        IntervalClustering.from_dict(json.loads(json.dumps(clusters.to_dict(), allow_nan=False))),
        pickle.loads(pickle.dumps(clusters)),
        copy.deepcopy(clusters),
    ]
    for other in copies:
        assert other == clusters
        assert hash(other) == hash(clusters)
        assert not other.boundaries.flags.writeable


def test_equality_is_by_value():
    assert from_sizes([2, 3]) != from_sizes([3, 2])
    assert from_sizes([2, 3], 1.0) != from_sizes([2, 3], 2.0)
    assert from_sizes([2, 3]) != "no clustering"
    assert len({from_sizes([2, 3]), from_sizes([2, 3])}) == 1


def test_is_frozen():
    boundaries = np.array([0, 2, 5])
    clusters = IntervalClustering(boundaries)
    boundaries[1] = 3
    assert clusters.boundaries.tolist() == [0, 2, 5]
    with pytest.raises(ValueError, match="read-only"):
        clusters.boundaries[1] = 3
    with pytest.raises(AttributeError):
        clusters.cost = 2.0


def test_repr_shows_the_intervals():
    assert repr(from_sizes([2, 3], 1.25)) == "IntervalClustering(k=2, T=5, cost=1.25: 0–1 | 2–4)"
    assert repr(IntervalClustering([0, 4])) == "IntervalClustering(k=1, T=4: 0–3)"
    assert "…" in repr(from_sizes([1] * 40))


@pytest.mark.parametrize(
    ("boundaries", "error", "message"),
    [
        ([0.0, 2.0], TypeError, "expected integers"),
        ([0], ValueError, r"expected shape \[k \+ 1\]"),
        ([[0, 1]], ValueError, r"expected shape \[k \+ 1\]"),
        ([1, 2], ValueError, "strictly increasing from 0"),
        ([0, 2, 2], ValueError, "strictly increasing from 0"),
        ([0, 3, 2], ValueError, "strictly increasing from 0"),
    ],
)
def test_bad_boundaries(boundaries, error, message):
    with pytest.raises(error, match=message):
        IntervalClustering(boundaries)


@pytest.mark.parametrize("state", [{}, {"boundaries": [0, 1]}, {"boundaries": [0, 1], "cost": 1, "k": 1}])
def test_bad_state(state):
    with pytest.raises(ValueError, match="expected the keys boundaries and cost"):
        IntervalClustering.from_dict(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 10])
def test_ranks_share_the_clusters(world_size):
    clusters = from_sizes([20] * 5)
    held = {rank: set() for rank in range(world_size)}
    for step in range(5):
        drawn = []
        for rank in range(world_size):
            t, cluster = clusters.sample(12, rank=rank, world_size=world_size, step=step)
            assert torch.equal(clusters.assign(t), cluster)
            assert torch.equal(cluster, cluster.sort().values)
            mine = set(cluster.tolist())
            assert len(mine) == -(-5 // world_size)
            held[rank] |= mine
            drawn += mine
        assert set(drawn) == set(range(5))
        counts = [drawn.count(k) for k in range(5)]
        assert max(counts) - min(counts) <= 1
    assert all(found == set(range(5)) for found in held.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank, world_size: expected both or none, found rank=0, world_size=None"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 <= rank < world_size, found 2 of 2"),
        ({"rank": 0, "world_size": 2, "step": -1}, "step: expected at least 0, found -1"),
    ],
)
def test_ranks_that_there_are_not(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_sizes([20] * 5).sample(12, **given)
