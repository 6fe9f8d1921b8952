"""What follows from stored results whose outcome is known."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from diffmtl_fast._errors import UserError
from diffmtl_fast.cli import study as command
from diffmtl_fast.study import results as stored
from diffmtl_fast.study import runner
from diffmtl_fast.study.claims import VERDICTS, _verdict, claims
from diffmtl_fast.study.plan import VANILLA, VARIANTS, make_plan
from diffmtl_fast.study.results import Curve, Results, load_results

BY_NAME = {variant.name: variant for variant in VARIANTS}


def curve(distances, steps=(1.0, 2.0, 4.0)):
    return Curve({"steps": np.array(steps)}, {"frechet_distance": np.array(distances)}, None, {})


def test_curves_are_interpolated_in_logarithms():
    found = curve([16.0, 8.0, 2.0])  # slope -1, then -2
    assert found.at("steps", math.sqrt(2)) == pytest.approx(16 / math.sqrt(2))
    assert found.at("steps", 4.0) == pytest.approx(2.0)
    assert found.reaches("steps", 4.0) == pytest.approx(2 * math.sqrt(2))
    assert found.reaches("steps", 20.0) == 1.0
    assert found.reaches("steps", 1.0) == math.inf
    assert curve([16.0, 2.0, 8.0]).reaches("steps", 8.0) == pytest.approx(2 ** (1 / 3))


def test_costs_are_ratios_within_a_round(study):
    results = load_results(study)
    assert {kind: round(cost.ratio, 6) for kind, cost in results.costs.items()} == {
        "vanilla": 1.0, "uw": 1.0, "pcgrad": 1.25, "nash": 1.5, "easy_to_hard": 1.0, "hard_to_easy": 1.0,
        "vanilla again": 1.0,
    }  # fmt: skip
    assert results.costs["nash"].high == pytest.approx(results.costs["nash"].low)


def index(results, name):
    return results.pairs().index((BY_NAME[name], VANILLA))


def test_quality_at_equal_steps_and_equal_time(study):
    results = load_results(study)
    some = [index(results, name) for name in ("uw-snr", "pcgrad-snr", "nash-snr")]
    steps = results.quality("steps")
    np.testing.assert_allclose(np.exp(steps.mean[some]), [0.5, 2.0, 1.0], rtol=0.03)
    assert steps.below[some].tolist() == [True, False, False]
    assert steps.above[some].tolist() == [False, True, False]
    time = results.quality("calibrated")  # at 8 plain steps, to which pcgrad does 6.4 and nash 5.33
    np.testing.assert_allclose(np.exp(time.mean[some]), [0.5, 2.5, 1.5], rtol=0.03)
    np.testing.assert_allclose(results.quality("measured").mean, steps.mean)
    order = results.pairs().index((BY_NAME["curriculum"], BY_NAME["anti-curriculum"]))
    assert np.exp(steps.mean[order]) == pytest.approx(0.5, rel=0.03)
    at_time = results.at_budget(BY_NAME["pcgrad-snr"], "calibrated")
    np.testing.assert_allclose(at_time, 100 / 6.4 * 2.0 * np.arange(1, 4), rtol=0.05)


def test_time_to_equal_quality(study):
    results = load_results(study)
    found = results.time_to_quality("steps")
    assert np.exp(found.mean[index(results, "uw-snr")]) == pytest.approx(0.5, rel=0.05)
    assert np.exp(found.mean[index(results, "pcgrad-snr")]) == pytest.approx(
        2.0, rel=0.05
    )  # nothing is cut off
    found = results.time_to_quality("calibrated")
    assert np.exp(found.mean[index(results, "pcgrad-snr")]) == pytest.approx(2.5, rel=0.05)
    assert results.reached(BY_NAME["pcgrad-snr"], "steps", 1.0) == [math.inf] * 3
    half = results.reached(BY_NAME["uw-snr"], "steps", 0.5)
    np.testing.assert_allclose(half, 2.0, rtol=0.05)


def simulated(rng, slow=(), methods="papers"):
    """A study whose methods differ by noise at every evaluation alone; the slow ones need twice the steps."""
    plan, steps = make_plan(quick=True, seeds=3, methods=methods), 80.0 * np.arange(1, 8)
    curves = {}
    for seed in range(plan.seeds):
        hard = 0.1 * rng.standard_normal()
        for variant in plan.variants:
            factor = 2.0 if variant.name in slow else 1.0
            distance = factor * 1500 / steps * np.exp(hard + 0.06 * rng.standard_normal(len(steps)))
            curves[variant.name, seed] = Curve({"steps": steps}, {"frechet_distance": distance}, None, {})
    empty = {field.name: {} for field in fields(Results)}
    return Results(**{**empty, "plan": plan, "curves": curves})


def test_finalists_are_the_fastest_of_the_first_seed_that_are_not_the_papers():
    plan = make_plan(quick=True, methods="all")
    others = [variant.name for variant in plan.variants if variant.family == "others"]
    slow = [name for name in others if name not in ("cagrad-snr", "continuous_uw")]
    results = simulated(np.random.default_rng(2), slow, "all")
    assert {variant.name for variant in results.promising(2)} == {"cagrad-snr", "continuous_uw"}
    del results.curves["cagrad-snr", 0]  # it diverged
    assert results.promising(1)[0].name == "continuous_uw"
    assert len(results.promising(100)) == len(others) - 1


def test_the_command_goes_on_with_the_finalists(tmp_path, monkeypatch):
    asked, chosen = [], [variant for variant in make_plan(methods="all").variants if variant.method == "mgda"]
    monkeypatch.setattr(runner, "study", lambda plan, folder, only, **how: asked.append(only.split(",")))
    monkeypatch.setattr(
        stored, "load_results", lambda folder: SimpleNamespace(promising=lambda n: chosen * n)
    )
    command.study(str(tmp_path / "study"), methods="all", quick=True, finalists=1)
    assert {"calibration", "vanilla-seed-0", "mgda-snr-seed-0", "continuous_uw-seed-0"} <= {*asked[0]}
    assert not any("pcgrad" in name or name.endswith("-seed-1") for name in asked[0])
    assert asked[1] == ["vanilla-seed-*", "mgda-snr-seed-*"]
    with pytest.raises(UserError, match="finalists: expected at least 1 and no --only, found 0"):
        command.study(str(tmp_path / "study"), methods="all", quick=True, finalists=0)


def test_time_to_equal_quality_favours_neither_side():
    rng, studies = np.random.default_rng(0), 100
    found = [simulated(rng).time_to_quality("steps") for _ in range(studies)]
    faster, slower = (sum(getattr(each, side).any() for each in found) for side in ("below", "above"))
    assert faster / studies < 0.05
    assert slower / studies < 0.05
    assert abs(np.mean([each.mean for each in found])) < 0.01


def test_slow_methods_are_found_and_do_not_make_others_fast():
    rng, slow = np.random.default_rng(1), [variant.name for variant in VARIANTS[1:7]]
    found = [simulated(rng, slow).time_to_quality("steps") for _ in range(40)]
    assert all(each.above[:6].all() for each in found)
    np.testing.assert_allclose(np.exp(np.mean([each.mean[:6] for each in found])), 2.0, rtol=0.05)
    assert sum(each.below.any() for each in found) <= 2
    assert sum(each.above[6:].any() for each in found) <= 3


def observation(results):
    return next(claim for claim in claims(results, -np.arange(100.0)) if claim.statement.startswith("O1"))


def test_affinity_that_falls_by_attenuation_alone_shows_nothing(study):
    tasks = np.repeat(np.arange(10), 10)  # of the quick plan
    noise = np.random.default_rng(0).standard_normal((10, 10))
    same = 0.9 + 0.01 * (noise + noise.T)
    np.fill_diagonal(same, 1.0)
    np.save(study.disattenuated, same[np.ix_(tasks, tasks)])
    found = observation(load_results(study))
    assert found.verdict == "not shown"
    assert "10 tasks, one run (seed 0)" in found.evidence


@pytest.mark.parametrize(("lost", "verdict"), [(2, "reproduced"), (8, "not measured")])
def test_tasks_of_nothing_but_noise_are_left_out(study, lost, verdict):
    affinity = np.load(study.disattenuated)
    affinity[: 10 * lost] = affinity[:, : 10 * lost] = np.nan
    np.save(study.disattenuated, affinity)
    found = observation(load_results(study))
    assert found.verdict == verdict
    assert f"{10 - lost} tasks, one run (seed 0); {lost} more left out" in found.evidence


def test_transfer_at_equal_iterations_and_at_equal_exposure(study):
    results = load_results(study)
    assert results.plan.exposures == (4,)
    expected = [[[8.0, 8.01, 8.02], [10.0] * 3], [[9.0, 9.01, 9.02], [20.0] * 3]]
    for iteration, distances in zip((None, 4.0), expected, strict=True):
        np.testing.assert_allclose(results.transfer_ratios(iteration), np.log(np.array(distances) / 10))
    assert results.transfer(4.0).high[0] < 0 < results.transfer(4.0).low[1]


def test_early_experts_are_interpolated_in_logarithms(study):
    results = load_results(study)
    gaps = {"frechet_distance": 10.0}
    early = {2: {**gaps, "switched_frechet_distance": [40.0, 10.0]},
             8: {**gaps, "switched_frechet_distance": [10.0, 10.0]}}  # fmt: skip
    results = replace(results, early_gaps={0: early})
    np.testing.assert_allclose(results.transfer_ratios(4.0), np.log([[2.0], [1.0]]), atol=1e-12)
    np.testing.assert_allclose(results.transfer_ratios(2), np.log([[4.0], [1.0]]), atol=1e-12)


@pytest.mark.parametrize(
    ("late", "early", "verdict"),
    [
        ([8.0, 10.0], [9.0, 20.0], "reproduced"),
        ([8.0, 8.0], [12.0, 12.0], "not shown"),  # no more than training on fewer timesteps
        ([12.0, 10.0], [20.0, 20.0], "not shown"),
        ([12.0, 12.0], [20.0, 20.0], "contradicted"),
        ([8.0, 8.0], None, "not measured"),
    ],
)
def test_harm_has_to_survive_at_equal_exposure(study, late, early, verdict):
    for seed in range(3):
        for iteration, distances in ((None, late), (4, early)):
            path = study.gaps(seed, iteration)
            if distances is None:
                path.unlink()
            else:
                noisy = [each * (1 + 0.001 * seed) for each in distances]
                path.write_text(
                    json.dumps(json.loads(path.read_text()) | {"switched_frechet_distance": noisy})
                )
    found = next(claim for claim in claims(load_results(study), -np.arange(100.0)) if "O2" in claim.statement)
    assert found.verdict == verdict
    assert ("equal exposure" in found.evidence) == (early is not None)


def test_verdicts(study):
    found = claims(load_results(study), -np.arange(100.0))
    verdicts = [(claim.statement.partition(":")[0], claim.verdict) for claim in found]
    assert verdicts == [
        ("O1", "reproduced"),
        ("O1", "reproduced"),
        ("O2", "reproduced"),
        ("Better quality", "mixed"),  # uw is better, pcgrad-snr worse
        ("Better quality", "mixed"),
        ("Faster convergence", "mixed"),
        ("Faster convergence", "mixed"),
        ("Low-noise intervals converge more slowly", "reproduced"),
        ("Better quality", "reproduced"),
        ("Better quality", "reproduced"),
        ("Faster convergence", "reproduced"),
        ("Faster convergence", "reproduced"),
        ("The order matters", "reproduced"),
    ]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        (9, 0, "reproduced"), (1, 0, "reproduced in part"), (1, 1, "mixed"), (0, 1, "worse in part"),
        (0, 9, "contradicted"), (0, 0, "not shown"),
    ],
)  # fmt: skip
def test_the_words_of_the_verdicts(better, worse, verdict):
    assert _verdict(better, worse, 9) == verdict
    assert verdict in VERDICTS


def test_experts_that_take_equally_many_steps_have_no_order(study):
    for seed in range(3):
        study.gaps(seed).with_name("difficulty.json").write_text('{"steps_to_fraction": [7.0, 7.0]}')
    found = claims(load_results(study), -np.arange(100.0))[7]
    assert (found.verdict, found.evidence) == ("not shown", "all experts took equally many steps")


def test_verdicts_of_a_part(study):
    for path in study.path.glob("evaluations/*.json"):
        if not path.name.startswith(("vanilla-", "nash-")):
            path.unlink()
    for seed in range(3):
        study.gaps(seed).unlink()
    study.affinity.unlink()
    study.disattenuated.unlink()
    study.calibration.unlink()
    found = claims(load_results(study), -np.arange(100.0))
    assert [claim.verdict for claim in found[3:7]] == ["not shown"] * 4
    assert {claim.verdict for claim in [*found[:3], *found[7:]]} == {"not measured"}


def test_no_study(tmp_path):
    from diffmtl_fast.study.folder import StudyFolder

    with pytest.raises(UserError, match="expected a study, found no plan"):
        load_results(StudyFolder(tmp_path))
