import brute_force
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast.clustering import (
    AbsoluteDeviation,
    FunctionCost,
    MatrixCost,
    cluster_intervals,
    cluster_path,
)


@numba.njit
def squared_size(l, r):
    return float((r - l + 1) ** 2)


@numba.njit
def size_root(l, r):
    return float(r - l + 1) ** 0.5


@numba.njit
def residue(l, r):
    return float((7 * l + 11 * r + l * r) % 13)


@numba.njit
def divides(l, r):
    return 1.0 / (r - l - 2)


@numba.njit
def no_number(l, r):
    return np.nan if (l, r) == (1, 3) else 1.0


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_matrix_is_the_best_of_all_partitions(data):
    n = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, n))
    min_size, max_size = data.draw(st.integers(1, n // k)), data.draw(st.integers(-(-n // k), n))
    entries = st.integers(-3, 3).map(float)
    matrix = np.array(data.draw(st.lists(entries, min_size=n * n, max_size=n * n))).reshape(n, n)
    found = cluster_intervals(matrix, n, k, min_size=min_size, max_size=max_size)
    boundaries, cost = brute_force.best(lambda l, e: matrix[l, e - 1], n, k, min_size, max_size)
    assert found.boundaries.tolist() == boundaries
    assert found.cost == cost


@pytest.mark.parametrize("n", [1, 2, 33, 150])
@pytest.mark.parametrize("function", [squared_size, residue])
def test_a_function_equals_its_matrix(function, n):
    matrix = np.array([[function(l, r) if l <= r else np.nan for r in range(n)] for l in range(n)])
    for k in {1, min(3, n), n}:
        assert cluster_intervals(function, n, k) == cluster_intervals(matrix, n, k)


def test_monge_agrees_with_dense():
    generator = np.random.default_rng(0)
    for _ in range(30):
        n = int(generator.integers(3, 70))
        k = int(generator.integers(1, n + 1))
        x = np.sort(generator.integers(0, 50, n)).astype(float)
        definition = AbsoluteDeviation(x)
        matrix = np.array(
            [[abs(x[l : r + 1] - x[(l + r + 1) // 2]).sum() for r in range(n)] for l in range(n)]
        )
        fast = cluster_intervals(matrix, n, k, monge=True)
        assert fast == cluster_intervals(matrix, n, k)
        assert fast == cluster_intervals(definition, n, k)


def test_monge_function():
    found = cluster_intervals(squared_size, 100, 7, monge=True)
    assert sorted(found.sizes) == [14] * 5 + [15] * 2
    assert found == cluster_intervals(squared_size, 100, 7)
    path = cluster_path(squared_size, 5, num_timesteps=100, monge=True)
    assert path[5].sizes.tolist() == [20] * 5


@pytest.mark.parametrize("limits", [{}, {"min_size": 2, "max_size": 30}])
def test_monge_path_is_the_optimum_of_every_k(limits):
    generator = np.random.default_rng(1)
    x = np.sort(generator.integers(0, 50, 60)).astype(float)
    matrix = np.array([[abs(x[l : r + 1] - x[(l + r + 1) // 2]).sum() for r in range(60)] for l in range(60)])
    path = cluster_path(matrix, 60, monge=True, **limits)
    for k in path.ks:
        assert path[k] == cluster_intervals(matrix, 60, int(k), **limits)


def test_no_price_for_a_users_cost():
    for monge in (False, True):
        with pytest.raises(ValueError, match=r"solver: expected auto.* or dense .*, found penalised"):
            cluster_intervals(squared_size, 10, 2, monge=monge, solver="penalised")


@pytest.mark.parametrize("n", [20, 500])
def test_a_false_monge_claim_names_the_quadruple(n):
    with pytest.raises(ValueError, match=r"at \(a, b, c, d\) = \(\d+, \d+, \d+, \d+\); use monge=False"):
        cluster_intervals(size_root, n, 3, monge=True)
    with pytest.raises(ValueError, match="use monge=False"):
        MatrixCost(-(np.subtract.outer(np.arange(n), np.arange(n)) ** 2.0), monge=True)


def test_infinity_forbids_an_interval():
    matrix = np.zeros((4, 4))
    matrix[0, 1] = matrix[0, 2] = np.inf
    assert cluster_intervals(matrix, 4, 2).boundaries.tolist() == [0, 1, 4]
    matrix[0, 0] = matrix[0, 3] = np.inf
    with pytest.raises(ValueError, match="expected a partition of finite cost"):
        cluster_intervals(matrix, 4, 2)


@pytest.mark.parametrize("monge", [False, True])
def test_values_that_are_no_numbers_are_refused(monge):
    matrix = np.zeros((70, 70))
    matrix[3, 69] = np.nan
    with pytest.raises(ValueError, match=r"(3, 69)|finite"):
        cluster_intervals(matrix, 70, 2 if not monge else 1, monge=monge)
    matrix[3, 69] = -np.inf
    with pytest.raises(ValueError, match=r"found -inf for the interval \(3, 69\)"):
        cluster_intervals(matrix, 70, 2)
    with pytest.raises(ValueError, match=r"found nan for the interval \(1, 3\)"):
        cluster_intervals(no_number, 6, 2)


def test_an_exception_in_the_cost_names_the_call():
    with pytest.raises(ValueError, match=r"cost: raised an exception in the call cost\(0, 2\)"):
        cluster_intervals(divides, 9, 2)


def test_the_cost_is_asked_within_the_limits_alone():
    # divides(l, l + 2) raises, an interval of size 3.
    for limits in ({"min_size": 4}, {"max_size": 2}):
        for n in (8, 70):
            k = {4: 2, 2: n // 2}[next(iter(limits.values()))]
            found = cluster_intervals(divides, n, k, **limits)
            assert found.sizes.min() >= limits.get("min_size", 1)
            assert found.sizes.max() <= limits.get("max_size", n)


def test_bad_costs():
    with pytest.raises(TypeError, match=r"expected a function compiled by @numba.njit"):
        cluster_intervals(lambda l, r: 0.0, 5, 2)
    with pytest.raises(TypeError, match="num_timesteps: expected the number of timesteps"):
        cluster_intervals(squared_size, k=2)
    with pytest.raises(TypeError, match=r"expected a float from cost\(int64, int64\)"):
        FunctionCost(numba.njit(lambda l: 0.0), 5)
    with pytest.raises(ValueError, match="expected a square matrix"):
        cluster_intervals(np.zeros((2, 3)), 2, 1)
    with pytest.raises(ValueError, match="num_timesteps: expected 3, found 4"):
        cluster_intervals(np.zeros((3, 3)), 4, 1)
    with pytest.raises(ValueError, match="k: expected an integer or 'auto', found 'best'"):
        cluster_intervals(np.zeros((3, 3)), 3, "best")
