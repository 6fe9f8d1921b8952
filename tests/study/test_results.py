"""What follows from stored results whose outcome is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffmtl_fast.study.claims import claims
from diffmtl_fast.study.plan import VANILLA, VARIANTS
from diffmtl_fast.study.results import Curve, load_results
from diffmtl_fast.train.errors import UserError

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


def test_quality_at_equal_steps_and_equal_time(study):
    results = load_results(study)
    pairs = [(BY_NAME[name], VANILLA) for name in ("uw-snr", "pcgrad-snr", "nash-snr")]
    steps = results.quality("steps", pairs)
    np.testing.assert_allclose(np.exp(steps.mean), [0.5, 2.0, 1.0], rtol=0.03)
    assert steps.high[0] < 0 < steps.low[1]
    assert steps.low[2] < 0 < steps.high[2]
    time = results.quality("calibrated", pairs)  # at 8 plain steps, to which pcgrad does 6.4 and nash 5.33
    np.testing.assert_allclose(np.exp(time.mean), [0.5, 2.5, 1.5], rtol=0.03)
    measured = results.quality("measured", pairs)
    np.testing.assert_allclose(measured.mean, steps.mean)


def test_time_to_quality(study):
    results = load_results(study)
    pairs = [(BY_NAME[name], VANILLA) for name in ("uw-snr", "pcgrad-snr")]
    found = results.time_to_quality("steps", pairs)
    assert np.exp(found.mean[0]) == pytest.approx(0.5, rel=0.05)
    assert np.exp(found.mean[1]) == pytest.approx(1.0)  # it does not get there: counted at its end
    assert results.reached(BY_NAME["pcgrad-snr"], "steps", 1.0) == [math.inf] * 3
    half = results.reached(BY_NAME["uw-snr"], "steps", 0.5)
    np.testing.assert_allclose(half, 2.0, rtol=0.05)


def test_verdicts(study):
    found = claims(load_results(study), -np.arange(100.0))
    verdicts = [(claim.statement.partition(":")[0], claim.verdict) for claim in found]
    assert verdicts == [
        ("O1", "reproduced"),
        ("O1", "reproduced"),
        ("O2", "reproduced"),
        ("Better quality", "mixed"),  # uw is better, pcgrad-snr worse
        ("Better quality", "mixed"),
        ("Faster convergence", "reproduced in part"),
        ("Faster convergence", "mixed"),
        ("Low-noise intervals converge more slowly", "reproduced"),
        ("Better quality", "reproduced"),
        ("Better quality", "reproduced"),
        ("Faster convergence", "reproduced"),
        ("Faster convergence", "reproduced"),
        ("The order matters", "reproduced"),
    ]


def test_verdicts_of_a_part(study):
    for path in study.path.glob("evaluations/*.json"):
        if not path.name.startswith(("vanilla-", "nash-")):
            path.unlink()
    for seed in range(3):
        study.gaps(seed).unlink()
    study.affinity.unlink()
    study.calibration.unlink()
    found = claims(load_results(study), -np.arange(100.0))
    assert [claim.verdict for claim in found[3:7]] == ["not shown"] * 4
    assert {claim.verdict for claim in [*found[:3], *found[7:]]} == {"not measured"}


def test_no_study(tmp_path):
    from diffmtl_fast.study.folder import StudyFolder

    with pytest.raises(UserError, match="expected a study, found no plan"):
        load_results(StudyFolder(tmp_path))
