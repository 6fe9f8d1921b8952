"""The curriculum: its pacing on scripted losses, what each phase draws, and its state."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmtl_fast.clustering import (
    IntervalClustering,
    LogNormalSigma,
    NoiseClustering,
    UniformTime,
    cluster_noise,
)
from diffmtl_fast.curriculum import DifficultyCurriculum

CLUSTERS = IntervalClustering(np.array([0, 3, 4, 10, 12]))  # C_1 … C_4
TASKS = IntervalClustering(np.array([0, 5, 11, 12]))
SIGMAS = cluster_noise(LogNormalSigma(), 4, cost="quantile")
TIMES = NoiseClustering(UniformTime(), np.array([0.0, 0.2, 0.5, 0.9, 1.0]))


def phases(curriculum, losses):
    """The phase of each iteration."""
    found = []
    for loss in losses:
        found.append(curriculum.phase)
        curriculum.update(loss)
    return found


def expected_phases(losses, n, patience, max_length=None, smoothing=0.0, min_delta=0.0):
    """The pacing written out in plain Python."""
    found, phase = [], 1
    best, average, age, stale = math.inf, None, 0, 0
    for loss in losses:
        found.append(phase)
        if phase > n:
            continue
        age += 1
        value = loss
        if math.isfinite(loss):
            if smoothing:
                average = loss if average is None else smoothing * average + (1 - smoothing) * loss
                value = average
            if value < best - min_delta:
                best, stale = value, -1
        stale += 1
        length = max_length[phase - 1] if isinstance(max_length, list) else max_length
        if (patience is not None and stale >= patience) or (length is not None and age >= length):
            phase += 1
            best, average, age, stale = math.inf, None, 0, 0
    return found


@pytest.mark.parametrize(
    ("options", "losses", "expected"),
    [
        # The first loss of a phase always improves on infinity; then three that do not.
        ({"patience": 3}, [5, 4, 4, 4.5, 4, 9, 8, 9, 9], [1, 1, 1, 1, 1, 2, 2, 2, 2]),
        # An improvement in between starts the count anew.
        ({"patience": 3}, [5, 6, 6, 4, 6, 6, 6, 1], [1, 1, 1, 1, 1, 1, 1, 2]),
        ({"patience": 1}, [1] * 9, [1, 1, 2, 2, 3, 3, 4, 4, 5]),
        # A loss that falls forever ends no phase; a limit does.
        ({"patience": 2}, [9, 8, 7, 6, 5, 4, 3], [1] * 7),
        ({"patience": 2, "max_length": 3}, [9, 8, 7, 6, 5, 4, 3], [1, 1, 1, 2, 2, 2, 3]),
        ({"patience": None, "max_length": 2}, [1] * 10, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (
            {"patience": None, "max_length": [1, 3, 1, 2]},
            [math.nan, 2, 1, 0, 9, 9, 9, 9, 9],
            [1, 2, 2, 2, 3, 4, 4, 5, 5],
        ),
        ({"patience": 2, "min_delta": 0.5}, [5, 4.6, 4.5, 4.4, 4.4, 4.4], [1, 1, 1, 2, 2, 2]),
        # Averages 4, 5 (stale), 4.5 (stale), 3.25: below the best only at the fourth.
        ({"patience": 3, "smoothing": 0.5}, [4, 6, 4, 2, 6, 6, 6, 1], [1, 1, 1, 1, 1, 1, 1, 2]),
        # What is not finite is no improvement, and is not averaged: 4, -, 3.
        ({"patience": 2, "smoothing": 0.5}, [4, math.nan, 2, math.inf, math.nan, 1], [1, 1, 1, 1, 1, 2]),
        ({"patience": 2}, [math.nan, math.nan, 1], [1, 1, 2]),
    ],
)
def test_pacing(options, losses, expected, device):
    curriculum = DifficultyCurriculum(CLUSTERS, **options).to(device)
    assert phases(curriculum, [torch.tensor(float(loss), device=device) for loss in losses]) == expected
    keywords = {"patience": None, **options}
    assert expected_phases(losses, 4, **keywords) == expected


@given(
    losses=st.lists(
        st.one_of(st.floats(0, 2, width=32), st.sampled_from([math.nan, math.inf])), min_size=1, max_size=60
    ),
    patience=st.one_of(st.none(), st.integers(1, 5)),
    max_length=st.one_of(st.none(), st.integers(1, 20), st.lists(st.integers(1, 20), min_size=4, max_size=4)),
    smoothing=st.sampled_from([0.0, 0.5, 0.75]),
    min_delta=st.sampled_from([0.0, 0.25]),
)
@settings(deadline=None, max_examples=60)
def test_pacing_is_the_rule_written_out(losses, patience, max_length, smoothing, min_delta):
    if patience is None and max_length is None:
        return
    options = {"max_length": max_length, "smoothing": smoothing, "min_delta": min_delta}
    curriculum = DifficultyCurriculum(CLUSTERS, patience, **options)
    # Dyadic numbers, so that the moving average is the same in any order of operations.
    losses = [round(loss * 16) / 16 if math.isfinite(loss) else loss for loss in losses]
    found = phases(curriculum, losses)
    assert found == expected_phases(losses, 4, patience, **options)


def test_the_defaults_are_the_published_ones():
    curriculum = DifficultyCurriculum(CLUSTERS)
    assert phases(curriculum, [1.0] * 202)[-2:] == [1, 2]
    assert (curriculum.smoothing, curriculum.min_delta, curriculum.max_length) == (0.0, 0.0, None)


def test_a_batch_of_losses_counts_as_its_mean():
    one, other = DifficultyCurriculum(CLUSTERS, 2), DifficultyCurriculum(CLUSTERS, 2)
    for low in (3.0, 2.0, 2.5, 2.25, 1.0):
        one.update(torch.tensor([low, low + 1], requires_grad=True))
        other.update(low + 0.5)
    assert (one.phase, float(one.best)) == (other.phase, float(other.best))


@pytest.mark.parametrize("noisiest", ["last", "first"])
@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy"])
@pytest.mark.parametrize("sampling", ["union", "clusters", "tasks"])
def test_probability_of_every_timestep_in_every_phase(sampling, order, noisiest, device):
    curriculum = DifficultyCurriculum(
        CLUSTERS,
        patience=None,
        max_length=1,
        order=order,
        sampling=sampling,
        tasks=TASKS,
        noisiest=noisiest,
        generator=torch.Generator(device).manual_seed(0),
    )
    t = torch.arange(12, device=device)
    for phase in range(1, 7):
        last_first = (order == "easy_to_hard") == (noisiest == "last")
        inside = CLUSTERS.assign(t) >= 4 - phase if last_first else CLUSTERS.assign(t) < phase
        if sampling == "union" or (sampling == "clusters" and phase > 4):
            strata = torch.zeros_like(t)
        else:
            strata = (CLUSTERS if sampling == "clusters" else TASKS).assign(t)
        expected = torch.zeros(12, dtype=torch.float64, device=device)
        present = strata[inside].unique()
        for stratum in present:
            member = inside & (strata == stratum)
            expected[member] = 1 / len(present) / member.sum()
        torch.testing.assert_close(curriculum.density(t), expected)

        drawn, cluster = curriculum.sample(6000)
        assert drawn.device.type == device.type
        assert torch.equal(TASKS.assign(drawn), cluster)
        assert (cluster.diff() >= 0).all()
        frequency = torch.bincount(drawn, minlength=12) / 6000
        torch.testing.assert_close(frequency.double(), expected, atol=5 * (0.25 / 6000) ** 0.5, rtol=0)
        assert (frequency[~inside] == 0).all()
        curriculum.update(torch.tensor(1.0, device=device))
    assert curriculum.finished


@pytest.mark.parametrize("batch_size", [1, 3, 7, 60])
@pytest.mark.parametrize("sampling", ["clusters", "tasks"])
def test_strata_of_a_phase_get_equal_numbers(sampling, batch_size):
    curriculum = DifficultyCurriculum(CLUSTERS, None, max_length=1, sampling=sampling, tasks=TASKS)
    strata = CLUSTERS if sampling == "clusters" else TASKS
    for phase in range(1, 5):
        t, _ = curriculum.sample(batch_size)
        counts = torch.bincount(strata.assign(t), minlength=strata.k)
        first = int(strata.assign(torch.tensor(int(CLUSTERS.boundaries[4 - phase]))))
        active = counts[first:]
        assert counts.sum() == active.sum() == batch_size
        assert active.max() - active.min() == (1 if batch_size % len(active) else 0)
        curriculum.update(1.0)


@pytest.mark.parametrize("clusters", [SIGMAS, TIMES], ids=["sigma", "time"])
@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy"])
@pytest.mark.parametrize("sampling", ["union", "clusters", "tasks"])
def test_continuous_levels(clusters, order, sampling):
    tasks = NoiseClustering(clusters.distribution, np.array([0.0, 0.35, 1.0]))
    curriculum = DifficultyCurriculum(
        clusters, None, max_length=1, order=order, sampling=sampling, tasks=tasks,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    for phase in range(1, 6):
        low, high = (4 - min(phase, 4), 4) if order == "easy_to_hard" else (0, min(phase, 4))
        low, high = clusters.probabilities[low], clusters.probabilities[high]
        level, cluster = curriculum.sample(4000, dtype=torch.float64)
        assert torch.equal(tasks.assign(level), cluster)
        p = clusters.distribution.cdf(level)
        assert low - 1e-12 <= p.min()
        assert p.max() <= high + 1e-12
        # The density integrates to 1, and the share of a part is what was drawn of it.
        edges = torch.linspace(low, high, 4001, dtype=torch.float64)
        middle = clusters.distribution.quantile((edges[1:] + edges[:-1]) / 2)
        mass = curriculum.density(middle) / clusters.distribution.density(middle) * edges.diff()
        assert float(mass.sum()) == pytest.approx(1, abs=2e-3)
        half = clusters.distribution.quantile(edges[2000:2001])
        assert float((level < half).double().mean()) == pytest.approx(float(mass[:2000].sum()), abs=0.04)
        outside = [share for share in (low / 2, (1 + high) / 2) if 0 < share < 1]
        outside = clusters.distribution.quantile(torch.tensor(outside, dtype=torch.float64))
        assert (curriculum.density(outside) == 0).all()
        curriculum.update(0.0)


def test_float32_levels_stay_in_the_phase():
    curriculum = DifficultyCurriculum(TIMES, generator=torch.Generator().manual_seed(0))
    level, cluster = curriculum.sample(100_000)
    assert level.dtype == torch.float32
    assert (cluster == 3).all()


def test_boundaries_computed_in_two_ways_are_one():
    # 0.1 + 0.2 and 0.3 differ in the last bit: no sliver between them that a third of the batch would go to.
    clusters = NoiseClustering(UniformTime(), np.array([0.0, 0.1 + 0.2, 1.0]))
    tasks = NoiseClustering(UniformTime(), np.array([0.0, 0.3, 1.0]))
    curriculum = DifficultyCurriculum(clusters, tasks=tasks, sampling="tasks")
    _, cluster = curriculum.sample(1000)
    assert (cluster == 1).all()


def _resumable(clusters, device):
    return DifficultyCurriculum(
        clusters, 3, smoothing=0.5, min_delta=0.01, max_length=20, sampling="clusters",
        generator=torch.Generator(device).manual_seed(5),
    )  # fmt: skip


@pytest.mark.parametrize("clusters", [CLUSTERS, SIGMAS], ids=["timesteps", "sigma"])
@pytest.mark.parametrize("stop", [0, 2, 9, 17])
def test_resumes_to_the_same_bits_in_the_middle_of_a_phase(clusters, stop, device):
    def run(curriculum, start, end):
        drawn = []
        for i in range(start, end):
            t, _ = curriculum.sample(5)
            drawn += [t, torch.tensor([curriculum.phase, int(curriculum.age), int(curriculum.stale)])]
            curriculum.update(torch.tensor(1.0 + 0.3 * math.sin(7.0 * i), device=device))
        return drawn

    whole = run(_resumable(clusters, device), 0, 30)
    first = _resumable(clusters, device)
    begun = run(first, 0, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = _resumable(clusters, device)
    second.generator.manual_seed(99)
    second.load_state_dict(torch.load(file, weights_only=True))
    again = run(second, stop, 30)
    assert all(torch.equal(a, b) for a, b in zip(whole, [*begun, *again], strict=True))
    assert whole[-1][0] > 1


def test_state_of_another_curriculum_is_refused():
    curriculum = DifficultyCurriculum(CLUSTERS)
    with pytest.raises(ValueError, match=r"expected the state of one over IntervalClustering\(k=4"):
        curriculum.load_state_dict(DifficultyCurriculum(TASKS).state_dict())
    owner = DifficultyCurriculum(CLUSTERS, generator=torch.Generator())
    with pytest.raises(ValueError, match="expected a state saved without a generator, found one saved with"):
        curriculum.load_state_dict(owner.state_dict())
    with pytest.raises(ValueError, match="expected a state saved with a generator, found one saved without"):
        owner.load_state_dict(curriculum.state_dict())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None,), {}, ValueError, "expected patience or max_length, found neither"),
        ((0,), {}, ValueError, "patience: expected an integer of at least 1, found 0"),
        ((2.5,), {}, ValueError, r"patience: expected an integer of at least 1, found 2\.5"),
        ((), {"max_length": 0}, ValueError, "max_length: expected an integer of at least 1, or 4"),
        ((), {"max_length": [1, 2]}, ValueError, r"max_length: .* found \[1, 2\]"),
        ((), {"max_length": 1.5}, ValueError, r"max_length: .* found 1\.5"),
        ((), {"smoothing": 1.0}, ValueError, r"smoothing: expected at least 0 and below 1, found 1\.0"),
        ((), {"min_delta": -1.0}, ValueError, r"min_delta: expected a number of at least 0, found -1\.0"),
        ((), {"min_delta": math.nan}, ValueError, "min_delta: .* found nan"),
        ((), {"order": "anti"}, ValueError, "order: expected one of easy_to_hard, hard_to_easy, found 'anti'"),
        ((), {"sampling": "all"}, ValueError, "sampling: expected one of union, clusters, tasks, found 'all'"),
        ((), {"noisiest": 0}, ValueError, "noisiest: expected one of last, first, found 0"),
        ((), {"tasks": SIGMAS}, ValueError, "expected a clustering of 12 timesteps, as clusters is, found levels"),
        ((), {"tasks": IntervalClustering(np.array([0, 5]))}, ValueError, "found 5 timesteps"),
        ((), {"tasks": 5}, TypeError, "tasks: expected an IntervalClustering or a NoiseClustering, found int"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        DifficultyCurriculum(CLUSTERS, *arguments, **options)


def test_bad_calls():
    curriculum = DifficultyCurriculum(CLUSTERS)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        curriculum.sample(0)
    with pytest.raises(TypeError, match=r"loss: expected a floating-point tensor, found torch\.int64"):
        curriculum.update(torch.tensor([1, 2]))
    with pytest.raises(
        TypeError, match="clusters: expected an IntervalClustering or a NoiseClustering, found list"
    ):
        DifficultyCurriculum([0, 3])
    assert "patience=200" in repr(curriculum)
