from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from benchmarks.reference import affinity_cost, optimal_intervals, snr_cost, timestep_cost
from benchmarks.reference.clustering import Cost


def _exhaustive(cost: Cost, num_timesteps: int, k: int) -> float:
    return min(
        sum(cost(l, r) for l, r in zip((0, *splits), (*splits, num_timesteps), strict=True))
        for splits in combinations(range(1, num_timesteps), k - 1)
    )


def _costs(num_timesteps: int, seed: int) -> dict[str, Cost]:
    rng = np.random.default_rng(seed)
    affinity = rng.uniform(-1, 1, (num_timesteps, num_timesteps))
    return {
        "timestep": timestep_cost(),
        "snr": snr_cost(np.sort(rng.standard_normal(num_timesteps).round(1))[::-1]),  # with ties
        "affinity": affinity_cost(affinity),
        "zero": snr_cost(np.zeros(num_timesteps)),  # splits that cost nothing are splits all the same
    }


@pytest.mark.parametrize("name", ["timestep", "snr", "affinity", "zero"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 5, 9, 10])
def test_cost_is_the_least_of_all_partitions(name: str, num_timesteps: int) -> None:
    cost = _costs(num_timesteps, seed=num_timesteps)[name]
    for k in range(1, num_timesteps + 1):
        boundaries, total = optimal_intervals(cost, num_timesteps, k)
        assert boundaries[0] == 0
        assert boundaries[-1] == num_timesteps
        assert (np.diff(boundaries) > 0).all()
        assert len(boundaries) == k + 1
        assert total == pytest.approx(sum(map(cost, boundaries[:-1], boundaries[1:])))
        assert total == pytest.approx(_exhaustive(cost, num_timesteps, k))


def test_costs_measure_from_the_middle_element() -> None:
    s = np.array([9.0, 5.0, 2.0, 1.0])
    assert timestep_cost()(0, 4) == 2 + 1 + 0 + 1
    assert snr_cost(s)(0, 3) == 4 + 0 + 3
    assert snr_cost(s)(0, 4) == 7 + 3 + 0 + 1
    affinity = np.arange(16.0).reshape(4, 4)
    assert affinity_cost(affinity)(1, 4) == -(9 + 10 + 11)


def test_a_clear_grouping_is_found() -> None:
    s = np.array([3.0, 3.0, 2.9, 0.1, 0.0, -4.0])
    boundaries, total = optimal_intervals(snr_cost(s), 6, 3)
    assert boundaries.tolist() == [0, 3, 5, 6]
    assert total == pytest.approx(0.2)


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 <= k <= T = 4, found {k}"):
        optimal_intervals(timestep_cost(), 4, k)
