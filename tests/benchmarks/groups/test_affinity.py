import numpy as np
import pytest
import torch

from benchmarks.benchmark import Options
from benchmarks.groups import affinity
from benchmarks.harness import GateError
from benchmarks.measure import measure
from benchmarks.reference import pairwise_cosines, timestep_gradients
from benchmarks.report.tables import table


def test_pairwise_cosines_and_gradients_by_hand():
    model = torch.nn.Linear(2, 1, bias=False).double()
    inputs = {0: [3.0, 4.0], 1: [-8.0, 6.0], 2: [-6.0, -8.0]}

    def losses(t):
        return [model(torch.tensor(inputs[t], dtype=torch.float64)).sum() for _ in range(2)]

    gradients = timestep_gradients(model, losses, [0, 1, 2])
    assert [g.tolist() for g in gradients] == [[6.0, 8.0], [-16.0, 12.0], [-12.0, -16.0]]
    assert all(p.grad is None for p in model.parameters())
    expected = torch.tensor([[1.0, 0, -1], [0, 1, 0], [-1, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(pairwise_cosines(gradients), expected)
    torch.testing.assert_close(pairwise_cosines(gradients[:1], gradients[1:]), expected[:1, 1:])


def test_the_published_loops_are_scaled_by_what_was_left_out(monkeypatch, device):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(affinity, "PART", (2, 3))
    seconds = iter([3.0, 6.0])  # of three gradients, of six pairs
    problem = affinity.Problem(lambda: affinity._unet((8, 8)), (1, 8, 8), 5, 2, device)

    def clock(run, repeats=1):
        run()
        return next(seconds)

    monkeypatch.setattr(affinity, "wall_clock", clock)
    found = problem.published_part()
    assert found.seconds == pytest.approx(5 * 3.0 / 3 + 25 * 6.0 / 6)
    assert problem.part_in_words().startswith("the time of 3 of 5 gradients and of 6 of 25 pairs")
    np.testing.assert_allclose(found.cosines, problem.exact[np.ix_(*problem.part)], atol=1e-5)
    seconds = iter([1.5, 1.5])
    assert affinity._clock(lambda: affinity.Scaled(7.0, found.cosines)) == 7.0
    assert affinity._clock(lambda: None) == 1.5


@pytest.mark.parametrize("in_files", [False, True])
def test_a_thousand_timesteps_in_small(in_files, monkeypatch, device):
    pytest.importorskip("diffusers")
    options = Options(device.type, "quick", memory=False)
    work = affinity._thousand(
        options, "small", lambda: affinity._unet((8, 8)), (1, 8, 8), 4, in_files=in_files
    )
    found = measure(work, options)
    assert [way.name for way in found.ways] == list(work.ways)
    assert all(way.error <= affinity.TOLERANCE for way in found.ways[1:])
    assert affinity.SCALED in table(found)
    assert "random ones, scaled by their numbers." in table(found)


def test_pairs_of_given_gradients(monkeypatch, device):
    options = Options(device.type, "quick", memory=False)
    work = affinity._pairs(options, 60, 500)
    found = measure(work, options)
    assert [way.name for way in found.ways] == list(work.ways)
    assert all(way.error <= affinity.TOLERANCE for way in found.ways[1:])
    assert "the time of 1,152 of 3,600 pairs, random ones, scaled by their number." in table(found)
    monkeypatch.setattr(affinity, "wall_clock", lambda run, repeats=1: run() or 2.0)
    assert affinity.Given(60, 500, device).published_part().seconds == 2.0 * 3600 / 1152
    monkeypatch.setattr(affinity.Given, "ours", lambda given: 1 - np.eye(60))
    with pytest.raises(GateError, match=r"diffmtl_fast: expected a relative error <= 0\.0001"):
        measure(work, options)


def test_all_ways_agree_before_they_are_timed(monkeypatch, device):
    pytest.importorskip("diffusers")
    options = Options(device.type, "quick", memory=False)
    work = affinity._benchmark(options, (8, 8), 5, 2)
    found = measure(work, options)
    assert [way.name for way in found.ways] == list(work.ways)
    assert all(way.error <= affinity.TOLERANCE for way in found.ways[1:])
    monkeypatch.setattr(affinity.Problem, "ours", lambda problem: 1 - problem.exact)
    with pytest.raises(GateError, match=r"diffmtl_fast: expected a relative error <= 0\.0001"):
        measure(work, options)
