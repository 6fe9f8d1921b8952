import numpy as np
import pytest

from diffmtl_fast.clustering import (
    AbsoluteDeviation,
    Affinity,
    ClusterPath,
    IntervalClustering,
    SquaredDeviation,
    cluster_affinity,
    cluster_intervals,
    cluster_path,
    cluster_snr,
    cluster_timesteps,
)


def groups(count, spread, seed=0):
    generator = np.random.default_rng(seed)
    return np.sort((np.arange(count)[:, None] * 10 + generator.uniform(-spread, spread, (count, 30))).ravel())


@pytest.mark.parametrize("cost", [AbsoluteDeviation, SquaredDeviation])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 9, 15])
def test_auto_finds_separated_groups(cost, count):
    x = groups(count, 0.5)
    found = cluster_intervals(cost(x), k="auto")
    assert found.sizes.tolist() == [30] * count
    assert cluster_intervals(cost(1e6 * x - 3e6), k="auto").k == count


def test_auto_finds_blocks_of_affinity():
    block = np.repeat(np.arange(4), 12)
    tas = np.where(block[:, None] == block, 1.0, -0.2)
    assert cluster_affinity(tas, "auto").sizes.tolist() == [12] * 4


def test_auto_of_a_constant_is_one_cluster():
    assert cluster_snr(np.zeros(50), "auto").k == 1
    assert cluster_timesteps(1, "auto").k == 1


def test_auto_on_a_smooth_sequence_grows_with_the_range():
    chosen = [cluster_timesteps(1000, "auto", k_max=k_max).k for k_max in (9, 25, 100)]
    assert chosen == [3, 5, 10]  # f(k) ~ 1 / k: the elbow is at √k_max


def test_elbow_is_the_furthest_below_the_chord():
    costs = [10.0, 6.0, 5.5, 5.0, 0.0]  # below the chord 10, 7.5, 5, 2.5, 0 by 0, 1.5, -0.5, -2.5, 0
    path = ClusterPath(tuple(IntervalClustering(range(k + 1), cost) for k, cost in enumerate(costs, 1)))
    assert path.chosen.k == 2
    shifted = ClusterPath(tuple(IntervalClustering(c.boundaries, 3 * c.cost - 50) for c in path.clusterings))
    assert shifted.chosen.k == 2


def test_auto_respects_limits():
    x = groups(4, 0.5)
    found = cluster_snr(x, "auto", min_size=40)
    assert found.k <= 3
    assert found.sizes.min() >= 40
    assert cluster_snr(x, "auto", max_size=20).k >= 6


def test_container():
    path = cluster_path(AbsoluteDeviation(groups(3, 1.0)), 6)
    assert len(path) == 6
    assert path.ks.tolist() == [1, 2, 3, 4, 5, 6]
    assert (np.diff(path.costs) < 0).all()
    assert path[4].k == 4
    for k in (0, 7):
        with pytest.raises(KeyError, match="k: expected 1 <= k <= 6"):
            path[k]


def test_bad_input():
    with pytest.raises(ValueError, match="expected consecutive k"):
        ClusterPath((IntervalClustering([0, 5]), IntervalClustering([0, 1, 2, 5])))
    with pytest.raises(ValueError, match="expected consecutive k"):
        ClusterPath(())
    with pytest.raises(ValueError, match="k_max: expected at least 1, found 0"):
        cluster_path(Affinity([[1.0]]), 0)
    with pytest.raises(ValueError, match=r"expected a k of at most 2 that T = 10, .* allow, found none"):
        cluster_path(AbsoluteDeviation(np.arange(10.0)), 2, max_size=3)
