"""A whole study of tiny runs: everything is made, nothing twice, and an interrupted one goes on."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from diffmtl_fast._errors import UserError
from diffmtl_fast.cli import main
from diffmtl_fast.study import work
from diffmtl_fast.study.calibration import CONTROL, costs
from diffmtl_fast.study.folder import StudyFolder
from diffmtl_fast.study.plan import VANILLA, VARIANTS, bundled, make_plan
from diffmtl_fast.train.checkpoint import checkpoints


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plan(device):
    return make_plan(
        {**bundled(quick=True)["base"], "device": str(device)}, quick=True, seeds=1, iterations=2
    )


def test_a_run_is_evaluated_once_and_can_be_used_with_the_trainer(plan, tmp_path, device, capsys):
    study, variant = StudyFolder(tmp_path / "study"), VARIANTS[2]
    work.train_and_evaluate(study, plan, variant, 0)
    rows = json.loads(study.evaluations(variant, 0).read_text())
    assert [row["iteration"] for row in rows] == [1, 2]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]
    run = study.run(variant, 0)
    assert [path.name for path in checkpoints(run.checkpoints)] == ["iter-00000002"]

    assert main(["evaluate", "--run", str(run), "--device", str(device)]) == 0
    metrics = json.loads(run.metrics.read_text())["samples"]
    assert metrics == {name: rows[-1][name] for name in metrics}

    capsys.readouterr()
    work.train_and_evaluate(study, plan, variant, 0)
    assert capsys.readouterr().out == ""


def test_an_interrupted_evaluation_does_not_train_again(plan, tmp_path, monkeypatch, capsys):
    study = StudyFolder(tmp_path / "study")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "evaluate_checkpoints", interrupt)
        with pytest.raises(KeyboardInterrupt):
            work.train_and_evaluate(study, plan, VANILLA, 0)
    assert not study.evaluations(VANILLA, 0).exists()
    work.train_and_evaluate(study, plan, VANILLA, 0)
    assert "is already complete" in capsys.readouterr().out
    assert len(json.loads(study.evaluations(VANILLA, 0).read_text())) == 2
    assert len(checkpoints(study.run(VANILLA, 0).checkpoints)) == 2  # the affinities need them all


def test_costs_are_measured_of_every_kind(plan, tmp_path):
    study = StudyFolder(tmp_path)
    work.measure_costs(study, plan, rounds=2)
    stored = json.loads(study.calibration.read_text())
    assert set(stored["seconds"]) == {variant.kind for variant in VARIANTS} | {CONTROL}
    assert {len(seconds) for seconds in stored["seconds"].values()} == {2}
    assert all(seconds > 0 for values in stored["seconds"].values() for seconds in values)
    assert costs(stored)["vanilla"].ratio == 1.0
    work.measure_costs(study, plan, rounds=3)
    assert json.loads(study.calibration.read_text()) == stored


def test_affinity_experts_and_gaps(plan, tmp_path):
    study = StudyFolder(tmp_path / "study")
    work.train_and_evaluate(study, plan, VANILLA, 0)
    work.measure_affinity(study, plan)
    clustered_by = study.affinity.read_bytes()
    work.measure_disattenuated_affinity(study, plan)
    assert study.affinity.read_bytes() == clustered_by
    assert json.loads(study.disattenuated.with_suffix(".json").read_text())["samples"] == 4 * plan.samples
    by_affinity = next(variant for variant in VARIANTS if variant.cost == "affinity")
    work.train_and_evaluate(study, plan, by_affinity, 0)
    assert study.run(by_affinity, 0).read_config().clusters.affinity == str(study.affinity)
    for index in range(plan.intervals):
        work.train_one_expert(study, plan, 0, index)
    work.measure_gaps(study, plan, 0)
    assert json.loads(study.gaps(0).read_text())["boundaries"] == [0, 50, 100]
    assert plan.exposures == (1,)
    work.measure_early_gaps(study, plan, 0, 1)
    late, early = (json.loads(study.gaps(0, iteration).read_text()) for iteration in (None, 1))
    assert (late["expert_iterations"], early["expert_iterations"]) == (2, 1)
    assert late["frechet_distance"] == early["frechet_distance"]
    assert late["switched_frechet_distance"] != early["switched_frechet_distance"]


def test_command(tmp_path, monkeypatch, capsys, device):
    monkeypatch.chdir(tmp_path)
    base = make_plan(quick=True).to_dict()["base"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**base, "device": str(device), "iterations": 2}))
    begin = [
        "study",
        "--config",
        "base.yaml",
        "--quick",
        "--seeds",
        "1",
        "--evaluations",
        "1",
        "--study-dir",
        "s",
    ]
    assert main([*begin, "--jobs", "1", "--only", "vanilla-*"]) == 0
    out = capsys.readouterr().out
    assert "1/1  vanilla-seed-0: " in out
    assert "wrote s/report/report.md" in out
    text = (tmp_path / "s/report/report.md").read_text()
    assert "11 of 12 runs are missing" in text
    given = "--study-dir s --config base.yaml --seeds 1 --evaluations 1 --jobs 1 --only 'vanilla-*' --quick"
    assert f"Made by `diffmtl-fast study {given}`. It took " in text
    assert "![Real pictures, and those that every method draws](samples.png)" in text
    assert (tmp_path / "s/report/samples.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "s/report/report.md").unlink()
    assert main(["study", "--study-dir", "s", "--only", "vanilla-*", "--out", "elsewhere"]) == 0
    assert capsys.readouterr().out == "wrote elsewhere/report.md\n"
    assert main(["study", "--study-dir", "s", "--report-only"]) == 0

    for arguments, message in (
        (["--study-dir", "none", "--report-only"], "none: expected a study, found no plan.json"),
        (["--study-dir", "s", "--seeds", "2", "--quick"], "seeds: expected 1, as in the study that is there"),
        (["--study-dir", "s", "--jobs", "0"], "jobs: expected an integer >= 1 and <= 1024, found 0"),
        (["--study-dir", "s", "--config", "none.yaml"], "none.yaml: cannot be read"),
    ):
        assert main(["study", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_what_fails_is_reported_after_the_rest(tmp_path, capsys):
    options = ["--quick", "--jobs", "1", "--only", "affinity"]
    assert main(["study", "--study-dir", str(tmp_path / "s"), *options]) == 2
    captured = capsys.readouterr()
    assert "1/1  affinity: failed after " in captured.out
    assert "no report yet" in captured.out
    assert captured.err.startswith("error: affinity failed: ")
    assert "expected complete plain training to analyse" in captured.err


def test_analyses_wait_for_plain_training(plan, tmp_path):
    study = StudyFolder(tmp_path / "study")
    for measure in (work.measure_affinity, lambda *it: work.measure_gaps(*it, 0)):
        with pytest.raises(UserError, match="expected complete plain training to analyse, found none yet"):
            measure(study, plan)
