"""What the report says of a study's conditions: command, times, costs, and what its settings favour."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffmtl_fast.clustering import cluster_timesteps
from diffmtl_fast.study import journal, report_setup
from diffmtl_fast.study.folder import all_runs, run_name
from diffmtl_fast.study.plan import bundled, make_plan
from diffmtl_fast.study.results import load_results


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({}, "diffmtl-fast study"),
        ({"seeds": 5, "iterations": 700}, "diffmtl-fast study --seeds 5 --iterations 700"),
        ({"quick": True, "evaluations": 4}, "diffmtl-fast study --quick --evaluations 4"),
        (
            {"base": {**bundled()["base"], "batch_size": 7}, "seeds": 2},
            "diffmtl-fast study --config BASE.yaml --seeds 2",
        ),
    ],
)
def test_a_command_that_makes_the_same_plan(options, command):
    assert report_setup.command_of(make_plan(**options)) == command


def test_origin_without_a_record_adds_up_what_is_stored(study):
    text = report_setup.origin(load_results(study), study)
    assert "the plan of `diffmtl-fast study --quick --seeds 3`; the command itself was not recorded" in text
    assert "How long it took was not recorded; training alone took 2 min in all for the runs and 0 s" in text


def test_origin_with_a_record(study):
    results = load_results(study)
    journal.add_command(study.journal, "diffmtl-fast study --jobs 4")
    runs = all_runs(results.plan)
    for place, run in enumerate(runs[:-1]):
        journal.add_work(study.journal, run_name(*run), 100.0 * (place // 2), 100.0)
    text = report_setup.origin(results, study)
    assert text.startswith("Made by `diffmtl-fast study --jobs 4`. The times of 1 runs were not recorded;")
    journal.add_work(study.journal, run_name(*runs[-1]), 1700.0, 100.0)
    assert "It took 30 min, in which 60 min of work were done." in report_setup.origin(results, study)


def test_costs_name_the_noise_and_what_it_does(study):
    text = report_setup.costs(load_results(study), 1234)
    assert "| nash | 1.500 | 1.500 to 1.500 | 0.300 |" in text
    assert "this model of 1,234 parameters with 20 images a step" in text
    assert "a second time: 1.000 (1.000 to 1.000) where 1 is true" in text
    assert "makes the Fréchet distance at equal time about 1.0 % too high" in text  # it is 100 / steps


def test_settings(study):
    results = load_results(study)
    clusters = {"timestep": cluster_timesteps(100, 4), "curriculum": cluster_timesteps(100, 100)}
    text = report_setup.settings(results, clusters)
    plain = [results.curves["vanilla", seed].figures["frechet_distance"] for seed in range(3)]
    before, end = np.mean(plain, axis=0)[-2:]
    assert f"went from {before:.2f} to {end:.2f}" in text
    assert "begins with timestep 99 alone, then adds 98" in text
    assert "ends after 1 iterations without improvement, or after 1 in all" in text
    assert "at every step, in the paper every 25" in text
    assert "drawn: by timestep clusters as often." in text


def test_phases_that_never_ended(study):
    log = study.run(next(v for v, _ in all_runs(load_results(study).plan) if v.name == "curriculum"), 1).log
    log.write_text(json.dumps({"iteration": 4, "phase": 2}) + "\n")
    text = report_setup.phases(load_results(study), cluster_timesteps(100, 3))
    assert "| curriculum | 6, never (it ended in phase 2), 6 |" in text
    assert "phase 4 in the pictures" in text
