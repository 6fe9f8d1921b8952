import re
from fractions import Fraction
from itertools import pairwise

import brute_force
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast.clustering import (
    SquaredDeviation,
    cluster_affinity,
    cluster_intervals,
    cluster_snr,
    cluster_timesteps,
)

# Small integers give ties and duplicates; the others are floats of up to 50 significant bits on one grid.
NUMBERS = {
    "integers": st.integers(-4, 4).map(float),
    "floats": st.integers(-(2**50), 2**50).map(lambda i: i * 2.0**-45),
}


@st.composite
def problems(draw, largest=11):
    """n, k, min_size, max_size with a solution."""
    n = draw(st.integers(1, largest))
    k = draw(st.integers(1, n))
    min_size = draw(st.integers(1, n // k))
    max_size = draw(st.integers(-(-n // k), n))
    return n, k, min_size, max_size


def monotone(draw, n):
    numbers = NUMBERS[draw(st.sampled_from(sorted(NUMBERS)))]
    values = sorted(draw(st.lists(numbers, min_size=n, max_size=n)))
    return values[::-1] if draw(st.booleans()) else values


@given(st.data(), problems())
@settings(max_examples=300, deadline=None)
def test_snr_is_the_best_of_all_partitions(data, problem):
    n, k, min_size, max_size = problem
    values = monotone(data.draw, n)
    found = cluster_snr(values, k, min_size=min_size, max_size=max_size)
    boundaries, cost = brute_force.best(brute_force.absolute(values), n, k, min_size, max_size)
    assert found.boundaries.tolist() == boundaries
    assert found.cost == pytest.approx(float(cost), rel=1e-14, abs=1e-300)


@given(st.data(), problems())
@settings(max_examples=300, deadline=None)
def test_squared_is_the_best_of_all_partitions(data, problem):
    n, k, min_size, max_size = problem
    values = monotone(data.draw, n)
    found = cluster_intervals(SquaredDeviation(values), n, k, min_size=min_size, max_size=max_size)
    definition = brute_force.squared(values)
    boundaries, cost = brute_force.best(definition, n, k, min_size, max_size)
    own = brute_force.total(definition, found.boundaries.tolist())
    assert found.cost == pytest.approx(float(own), rel=1e-13, abs=1e-300)
    # Each interval's cost is rounded to 73 bits of the largest one: costs as close as that may go either way.
    assert own == cost or float(own) == pytest.approx(
        float(cost), rel=1e-15, abs=k * float(definition(0, n)) * 2.0**-73
    )
    if all(value.is_integer() for value in values) and cost.denominator == 1:
        assert (found.sizes**2).sum() <= sum((e - l) ** 2 for l, e in pairwise(boundaries))


@given(problems())
@settings(deadline=None)
def test_timesteps_is_the_best_of_all_partitions(problem):
    n, k, min_size, max_size = problem
    found = cluster_timesteps(n, k, min_size=min_size, max_size=max_size)
    boundaries, cost = brute_force.best(brute_force.absolute(range(n)), n, k, min_size, max_size)
    assert found.boundaries.tolist() == boundaries
    assert found.cost == cost


@given(st.data(), problems(largest=9))
@settings(max_examples=200, deadline=None)
def test_affinity_is_the_best_of_all_partitions(data, problem):
    n, k, min_size, max_size = problem
    entries = data.draw(st.sampled_from([st.integers(-1, 1).map(float), st.floats(-1, 1, width=16)]))
    matrix = np.array(data.draw(st.lists(entries, min_size=n * n, max_size=n * n))).reshape(n, n)
    found = cluster_affinity(matrix, k, min_size=min_size, max_size=max_size)
    boundaries, cost = brute_force.best(brute_force.affinity(matrix.tolist()), n, k, min_size, max_size)
    assert found.boundaries.tolist() == boundaries
    assert found.cost == pytest.approx(float(cost), rel=1e-14, abs=1e-14)


def _log_snr(betas):
    alphas_cumprod = np.cumprod(1 - betas)
    return np.log(alphas_cumprod / (1 - alphas_cumprod))


def _cosine_betas(n):
    alpha_bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


@pytest.mark.parametrize(
    ("betas", "cost", "boundaries"),
    [
        (np.linspace(1e-4, 0.02, 1000), 781.740483, [0, 153, 394, 624, 823, 1000]),
        (_cosine_betas(1000), 705.505514, [0, 133, 372, 653, 881, 1000]),
        (np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 482.773327, [0, 149, 372, 605, 816, 1000]),
    ],
    ids=["linear", "cosine", "scaled-linear"],
)
def test_known_schedules(betas, cost, boundaries):
    found = cluster_snr(_log_snr(betas), 5)
    assert found.cost == pytest.approx(cost, abs=1e-6)
    np.testing.assert_allclose(found.boundaries, boundaries, atol=1)  # ties may move one by a step


def test_equal_timesteps():
    found = cluster_timesteps(1000, 5)
    assert found.boundaries.tolist() == [0, 200, 400, 600, 800, 1000]
    assert found.cost == 50000.0


@pytest.mark.parametrize("k", [1, 3, 7])
def test_constant_sequences_prefer_equal_sizes(k):
    for found in (cluster_snr(np.full(21, 0.1), k), cluster_affinity(np.full((21, 21), 0.1), k)):
        assert found.sizes.tolist() == [21 // k] * k


def test_affinity_reads_the_centre_row():
    matrix = np.zeros((4, 4))
    matrix[2] = [1, 1, 1, 1]  # only an interval centred on 2 has affinity: all four together
    assert cluster_affinity(matrix, 1).cost == -4
    assert cluster_affinity(matrix, 2).boundaries.tolist() == [0, 1, 4]
    assert cluster_affinity(matrix.T, 1).cost == -1


def test_inputs_of_any_kind_agree():
    values = np.linspace(5, -7, 50) ** 3
    expected = cluster_snr(values, 4)
    assert cluster_snr(values.tolist(), 4) == expected
    assert cluster_snr(torch.tensor(values, requires_grad=True), 4) == expected
    assert cluster_snr(np.repeat(values, 2)[::2], 4) == expected
    assert cluster_snr(-values, 4) == expected
    assert cluster_snr(np.frombuffer(b"x" + values.tobytes(), np.uint8)[1:].view(np.float64), 4) == expected
    assert cluster_snr(values.astype(values.dtype.newbyteorder()), 4) == expected
    assert cluster_snr(np.arange(50, dtype=np.int16), 4) == cluster_timesteps(50, 4)


@given(st.data(), problems())
@settings(deadline=None)
def test_floats_of_any_size(data, problem):
    # Values are rounded to 2^-61 of the largest one, which bounds what a wrong choice can cost.
    n, k, min_size, max_size = problem
    numbers = st.floats(-1e300, 1e300)
    values = sorted(data.draw(st.lists(numbers, min_size=n, max_size=n)))
    found = cluster_snr(values, k, min_size=min_size, max_size=max_size)
    _, cost = brute_force.best(brute_force.absolute(values), n, k, min_size, max_size)
    assert (
        float(cost) * (1 - 1e-14)
        <= found.cost
        <= float(cost) * (1 + 1e-14) + n * 2.0**-59 * max(map(abs, values))
    )


@pytest.mark.parametrize("shift", [0.0, 1e9, -1e12])
@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0, 1e200])
def test_scales_and_offsets(scale, shift):
    values = np.sort(np.random.default_rng(0).normal(size=60)) * scale + shift * scale
    found = cluster_snr(values, 6)
    cost = brute_force.absolute(values)
    exact = sum(cost(l, e) for l, e in zip(found.boundaries[:-1], found.boundaries[1:], strict=True))
    assert found.cost == pytest.approx(float(exact), rel=1e-14)
    assert found == cluster_snr(-values, 6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, float("nan"), 1.0], "log_snr: expected finite values, found nan at index 1"),
        ([float("inf"), 0.0], "log_snr: expected finite values, found inf at index 0"),
        (
            [0.0, 0.0, 2.0, 1.0],
            "log_snr: expected a monotone sequence, found 2 then 1 at index 3 of a rising one",
        ),
        (
            [3.0, 1.0, 2.0],
            "log_snr: expected a monotone sequence, found 1 then 2 at index 2 of a falling one",
        ),
        ([[1.0, 2.0]], "log_snr: expected shape \\[T\\], found \\[1, 2\\]"),
        ([-1e308, 1.7e308], "log_snr: expected a range whose cost is a finite number, found -1"),
        ([], "expected between 1 and .* timesteps, found 0"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        cluster_snr(values, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected 1 <= k <= T = 10, found 0"),
        ({"k": 11}, "k: expected 1 <= k <= T = 10, found 11"),
        ({"k": 3, "min_size": 4}, "min_size: 3 intervals of at least 4 need more than T = 10 timesteps"),
        ({"k": 3, "max_size": 3}, "max_size: 3 intervals of at most 3 cannot cover T = 10 timesteps"),
        ({"k": 3, "min_size": 0}, "min_size: expected at least 1, found 0"),
        ({"k": 3, "min_size": 3, "max_size": 2}, "max_size: expected at least min_size = 3, found 2"),
    ],
)
def test_bad_sizes(arguments, message):
    for call in (
        lambda **kw: cluster_timesteps(10, **kw),
        lambda **kw: cluster_snr(np.arange(10.0), **kw),
        lambda **kw: cluster_affinity(np.eye(10), **kw),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)


@pytest.mark.parametrize("name", ["k", "min_size", "max_size", "k_max", "threads"])
@pytest.mark.parametrize("value", [2.5, 2.0, "3", [3]])
def test_only_integers_are_integers(name, value):
    arguments = {"k": "auto" if name == "k_max" else 2} | {name: value}
    error = ValueError if (name, value) == ("k", "3") else TypeError
    with pytest.raises(error, match=f"{name}: expected an integer.* found {re.escape(repr(value))}"):
        cluster_timesteps(10, **arguments)


def test_integers_of_any_kind():
    expected = cluster_timesteps(10, 2)
    assert cluster_timesteps(np.int32(10), torch.tensor(2)) == expected
    with pytest.raises(TypeError, match=r"num_timesteps: expected an integer, found 10\.5"):
        cluster_timesteps(10.5, 2)
    with pytest.raises(TypeError, match="k: expected an integer, found None"):
        cluster_timesteps(10, None)
    with pytest.raises(ValueError, match="k: expected an integer of at most 64 bits, found 1000"):
        cluster_timesteps(10, 10**30)
    with pytest.raises(ValueError, match="num_timesteps: expected at most 268435456, found 4611686"):
        cluster_timesteps(2**62, 2)
    with pytest.raises(ValueError, match=r"log_snr: expected shape \[T\], found \[\]"):
        cluster_snr(np.float64(3), 3)


def test_bad_affinity():
    with pytest.raises(ValueError, match="square matrix, found shape"):
        cluster_affinity(np.zeros((2, 3)), 1)
    with pytest.raises(ValueError, match=r"found nan at index \(1, 0\)"):
        cluster_affinity([[0, 0], [float("nan"), 0]], 1)
    with pytest.raises(ValueError, match=r"found -inf at index \(0, 1\)"):
        cluster_affinity(np.array([[0, -np.inf], [0, 0]], dtype=np.float32), 1)
    with pytest.raises(ValueError, match="entries whose sum is a finite number"):
        cluster_affinity(np.full((3, 3), 1e308), 1)
    with pytest.raises(ValueError, match="values: expected a range whose cost"):
        cluster_intervals(SquaredDeviation([0, 1e200]), k=1)
    with pytest.raises(TypeError, match="tas: expected real numbers"):
        cluster_affinity("tas", 1)


def test_rational_costs_of_the_definition():
    # A hand-made instance: [0, 1, 3 | 10, 12] has cost (1 + 2) + 2.
    found = cluster_snr([0, 1, 3, 10, 12], 2)
    assert found.boundaries.tolist() == [0, 3, 5]
    assert Fraction(found.cost) == 5
