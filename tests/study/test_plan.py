"""The plan of a study: its variants, configurations, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffmtl_fast._errors import UserError
from diffmtl_fast.study.plan import VARIANTS, Plan, bundled, make_plan
from diffmtl_fast.train.config import CONTINUOUS, PLAIN
from diffmtl_fast.weighting import METHODS


def test_the_variants_are_those_of_the_papers():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS) == 12
    clustered = {(v.method, v.cost) for v in VARIANTS if v.family == "clusters"}
    assert clustered == {
        (method, cost)
        for method in ("uw", "pcgrad", "nash")
        for cost in ("timestep", "snr", "affinity")
    }  # fmt: skip
    assert {v.order for v in VARIANTS if v.family == "curriculum"} == {"easy_to_hard", "hard_to_easy"}


def test_the_other_methods_are_all_that_are_registered():
    names = {variant.method for variant in make_plan(methods="all").variants}
    assert names == {PLAIN, CONTINUOUS, *METHODS} - {"equal", "constant"}  # those are plain training
    assert make_plan().variants == VARIANTS
    plan = make_plan(quick=True, methods="cagrad,uw,continuous_uw")
    assert [variant.name for variant in plan.variants] == [
        "vanilla", "uw-timestep", "uw-snr", "uw-affinity", "continuous_uw", "cagrad-snr",
    ]  # fmt: skip
    assert plan.config(plan.variants[-2], 0).method == "continuous_uw"
    assert {variant.family for variant in plan.variants} == {"baseline", "clusters", "others"}
    with pytest.raises(UserError, match=r"methods: expected papers, all, or names .*, found cagrid"):
        make_plan(methods="uw,cagrid")
    with pytest.raises(
        UserError, match="methods: expected cagrad,uw,continuous_uw, as in the study that is there"
    ):
        make_plan(quick=True).check_same(plan)


@pytest.mark.parametrize("quick", [False, True])
def test_runs_differ_in_nothing_but_the_variant_and_the_seed(quick):
    plan = make_plan(quick=quick)
    for variant in VARIANTS:
        config = plan.config(variant, 1, Path("tas.npy"))
        assert (config.method, config.seed, config.curriculum.order) == (variant.method, 1, variant.order)
        assert (config.clusters.affinity == "tas.npy") == (variant.cost == "affinity")
        assert (config.model, config.optimizer, config.iterations) == (
            plan.base.model, plan.base.optimizer, plan.iterations,
        )  # fmt: skip
        assert config.checkpoints.every * plan.evaluations == config.iterations
        assert config.checkpoints.keep == plan.evaluations


def test_a_plan_survives_its_file(tmp_path):
    plan = make_plan(quick=True, seeds=1)
    plan.save(tmp_path / "plan.json")
    read = Plan.read(tmp_path / "plan.json")
    assert read == plan
    read.check_same(plan)
    with pytest.raises(UserError, match="seeds: expected 1, as in the study that is there, found 2"):
        make_plan(quick=True, seeds=2).check_same(plan)
    with pytest.raises(UserError, match="iterations: expected 8, as in the study that is there, found 4"):
        make_plan(quick=True, seeds=1, iterations=4).check_same(plan)


def test_a_configuration_of_the_user(tmp_path):
    base = {**bundled(quick=True)["base"], "batch_size": 7}
    assert make_plan(base, quick=True).base.batch_size == 7
    with pytest.raises(UserError, match="evaluations: expected a divisor of the 8 iterations, found 3"):
        make_plan(base, quick=True, evaluations=3)
    with pytest.raises(UserError, match="seeds: expected at least 1, found 0"):
        make_plan(base, quick=True, seeds=0)
    with pytest.raises(UserError, match="expected pictures to evaluate"):
        make_plan({**base, "evaluation": {"num_samples": 0}}, quick=True)
    with pytest.raises(UserError, match="expected a study, found no plan"):
        Plan.read(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="expected the plan of a study"):
        Plan.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("iterations", "evaluations", "intervals", "expected"),
    [
        (560, 7, 5, (80, 160)),
        (560, 10, 5, (112,)),
        (8, 2, 2, (4,)),
        (8, 1, 2, ()),
        (9, 3, 3, (3,)),
        (10, 5, 3, (2, 4)),
        (12, 2, 7, ()),
    ],
)
def test_checkpoints_that_bracket_equal_exposure(iterations, evaluations, intervals, expected):
    plan = replace(make_plan(iterations=iterations, evaluations=evaluations), intervals=intervals)
    assert plan.exposures == expected
    assert not expected or expected[0] <= plan.equal_exposure <= expected[-1]
