"""The analyses of a run: files, resuming, and what they refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffmtl_fast._errors import UserError
from diffmtl_fast.analysis import FrechetDistance, SwitchedModel, task_affinity
from diffmtl_fast.clustering import cluster_timesteps
from diffmtl_fast.run import analyses
from diffmtl_fast.run.experts import expert_config, expert_folder, load_expert
from diffmtl_fast.run.sampling import build_sampler
from diffmtl_fast.run.trained_denoiser import load
from diffmtl_fast.run.training import train
from diffmtl_fast.train import history
from diffmtl_fast.train.checkpoint import checkpoints, load_module
from diffmtl_fast.train.components import build_data, build_model, build_noise, build_scheduler
from diffmtl_fast.train.folder import RunFolder
from diffmtl_fast.train.loop import Trainer


@pytest.fixture
def run(tiny, tmp_path):
    """A finished run of six iterations, which keeps its last two checkpoints."""
    folder = RunFolder(tmp_path / "run")
    train(tiny(), folder)
    return folder


def test_affinity(run, tiny, tmp_path, device, capsys):
    paths = analyses.affinity(str(run), device=str(device), tasks=5, samples=3, batch_size=12)
    assert [path.name for path in paths] == ["affinity.npy", "affinity.json", "affinity.png"]
    assert sorted(path.name for path in run.analysis.iterdir()) == sorted(path.name for path in paths)
    matrix = np.load(paths[0])
    assert matrix.shape == (20, 20)
    assert (matrix.diagonal() == 1.0).all()
    about = json.loads(paths[1].read_text())
    assert about["checkpoints"] == ["iter-00000004", "iter-00000006"]
    assert about["error_bound"] == 0.0

    clusters = {"cost": "affinity", "affinity": str(paths[0]), "k": 2}
    train(tiny(clusters=clusters), RunFolder(tmp_path / "next"))
    assert (tmp_path / "next" / "clusters.png").exists()


def test_affinity_is_the_mean_over_the_checkpoints_raw_weights(run, device):
    config = run.read_config()
    data, noise = build_data(config), build_noise(config, build_scheduler(config), device)
    model = build_model(config, data, device)
    loss, expected = analyses.denoising_loss(config, data, noise, device), []
    for path in checkpoints(run.checkpoints):
        load_module(path, "model", model)
        expected.append(task_affinity(model, loss, cluster_timesteps(20, 4), samples=2).matrix)
    both = np.load(analyses.affinity(str(run), device=str(device), tasks=4, samples=2)[0])
    np.testing.assert_array_equal(both, np.mean(expected, axis=0))
    last = np.load(
        analyses.affinity(str(run), device=str(device), checkpoint=str(path), tasks=4, samples=2)[0]
    )
    np.testing.assert_array_equal(last, expected[-1])


def test_disattenuated_affinity(run, device):
    options = {"tasks": 4, "samples": 6}
    paths = analyses.affinity(str(run), device=str(device), disattenuate=True, **options)
    assert [path.name for path in paths] == [
        f"affinity-disattenuated.{end}" for end in ("npy", "json", "png")
    ]
    reliability = np.array(json.loads(paths[1].read_text())["reliability"])
    assert reliability.shape == (2, 4)
    config = run.read_config()
    data, noise = build_data(config), build_noise(config, build_scheduler(config), device)
    model = build_model(config, data, device)
    load_module(checkpoints(run.checkpoints)[0], "model", model)
    loss = analyses.denoising_loss(config, data, noise, device)
    expected = task_affinity(model, loss, cluster_timesteps(20, 4), samples=6, reliability=True)
    np.testing.assert_array_equal(reliability[0], expected.reliability[0])
    one = analyses.affinity(
        str(run),
        device=str(device),
        checkpoint=str(checkpoints(run.checkpoints)[0]),
        disattenuate=True,
        **options,
    )
    np.testing.assert_array_equal(np.load(one[0]), expected.disattenuated.matrix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 21}, "tasks: k: expected 1 <= k <= T = 20, found 21"),
        ({"samples": 0}, "affinity: samples: expected an integer >= 1, found 0"),
        ({"projection": 3}, "affinity: projection: expected a power of two"),
    ],
)
def test_affinity_refuses(run, device, options, message):
    with pytest.raises(UserError, match=message):
        analyses.affinity(str(run), device=str(device), **options)


def test_negative_transfer_is_that_of_the_experts_put_to_use(run, device):
    paths = analyses.negative_transfer(
        str(run), device=str(device), intervals=2, iterations=3, num=70, resamples=5
    )
    assert [path.name for path in paths] == ["negative-transfer.json", "negative-transfer.png"]
    found = json.loads(paths[0].read_text())
    assert found["boundaries"] == [0, 10, 20]
    assert (found["iterations"], found["expert_iterations"], found["num_samples"]) == (6, 3, 70)

    trained = load(run, replace(run.read_config(), device=str(device)))
    judge, labels = trained.judge(), torch.arange(70) % 10
    distance = FrechetDistance(judge.real)
    assert distance(judge.features(trained.draw(labels, 70, 0))) == pytest.approx(found["frechet_distance"])
    for (first, end), expected in zip([(0, 10), (10, 20)], found["switched_frechet_distance"], strict=True):
        expert = load_expert(expert_folder(run, first, end), str(device))
        assert expert.config.timesteps.interval == [first, end]
        assert expert.iteration == 3
        both = replace(trained, model=SwitchedModel(trained.model, expert.model, first, end))
        assert distance(judge.features(both.draw(labels, 70, 0))) == pytest.approx(expected)
    gaps = np.array(found["switched_frechet_distance"]) - found["frechet_distance"]
    np.testing.assert_allclose(found["gaps"], gaps)


def test_negative_transfer_by_experts_as_they_were(run, device):
    options = {"intervals": 2, "num": 20, "resamples": 2}
    paths = analyses.negative_transfer(str(run), device=str(device), expert_iteration=4, **options)
    assert [path.name for path in paths] == ["negative-transfer-at-4.json", "negative-transfer-at-4.png"]
    early = json.loads(paths[0].read_text())
    assert (early["iterations"], early["expert_iterations"]) == (6, 4)
    shorter = {folder: checkpoints(folder.checkpoints)[-1] for folder in
               (expert_folder(run, 0, 10), expert_folder(run, 10, 20))}  # fmt: skip
    for folder, last in shorter.items():
        assert load_expert(folder, str(device)).iteration == 6
        shutil.rmtree(last)
        assert load_expert(folder, str(device)).iteration == 4
    same = json.loads(
        analyses.negative_transfer(str(run), device=str(device), iterations=4, **options)[0].read_text()
    )
    assert same == early
    with pytest.raises(UserError, match=r"expert_iteration: .* a checkpoint of \(4, 6\), found 5"):
        analyses.negative_transfer(str(run), device=str(device), expert_iteration=5, **options)


def test_difficulty_and_negative_transfer_share_their_experts(run, device, capsys):
    paths = analyses.difficulty(str(run), device=str(device), intervals=2, iterations=4, fraction=0.5)
    assert [path.name for path in paths] == ["difficulty.json", "convergence.png", "relative-entropy.png"]
    found = json.loads(paths[0].read_text())
    log = history.read(expert_folder(run, 0, 10).log)
    assert [line["iteration"] for line in log] == [1, 2, 3, 4]
    assert len(found["steps_to_fraction"]) == 2
    entropies = found["relative_entropy"].values()
    assert [len(values) for values in entropies] == [19, 19]
    assert all(value > 0 for values in entropies for value in values)

    capsys.readouterr()
    options = {"intervals": 2, "iterations": 4, "num": 20, "resamples": 2}
    analyses.negative_transfer(str(run), device=str(device), **options)
    assert capsys.readouterr().out.count("is already complete") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intervals": 21}, "intervals: k: expected 1 <= k <= T = 20, found 21"),
        ({"intervals": 2, "iterations": 0}, "iterations: expected at least 1, found 0"),
        ({"intervals": 2, "resamples": 0}, "resamples: expected at least 1, found 0"),
        ({"intervals": 2, "num": 3}, "evaluation.num_samples: expected more than 3, found 3"),
        ({"intervals": 2, "steps": 0}, "steps: expected at least 1, found 0"),
        ({"intervals": 2, "fraction": 1.0}, "fraction: expected a number between 0 and 1, found 1.0"),
        ({"intervals": 2, "fraction": 0.5, "iterations": 1}, "iterations: steps: expected at least two"),
    ],
)
def test_experts_refuse(run, device, options, message):
    measure = analyses.difficulty if "fraction" in options else analyses.negative_transfer
    with pytest.raises(UserError) as caught:
        measure(str(run), device=str(device), **({} if "fraction" in options else {"num": 20}) | options)
    assert str(caught.value).startswith(message)


def test_an_expert_is_plain_training_on_its_interval(tiny):
    curriculum = {"order": "easy_to_hard", "clusters": {"k": 4}}
    config = tiny(method="nash", curriculum=curriculum, loss={"weight": "min_snr"}, batch_size=7)
    expert = expert_config(config, 5, 8)
    assert (expert.method, expert.curriculum.order, expert.timesteps.interval) == ("vanilla", "none", [5, 8])
    assert (expert.loss, expert.batch_size, expert.iterations) == (config.loss, 7, config.iterations)
    timesteps = Trainer(expert).timesteps.sample(200)[0]
    assert timesteps.unique().tolist() == [5, 6, 7]


def test_no_checkpoint(tiny, tmp_path, device):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_config(tiny())
    with pytest.raises(UserError, match="expected a checkpoint, found none yet"):
        analyses.affinity(str(folder), device=str(device))
    with pytest.raises(UserError, match="expected a checkpoint, found none yet"):
        analyses.negative_transfer(str(folder), device=str(device), intervals=2)


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_analyses_of_continuous_levels(tiny, tmp_path, device, process):
    """Timesteps are cells of equal probability; a denoiser that is its own expert has no gap."""
    run = RunFolder(tmp_path / "run")
    train(tiny(process=process, iterations=2), run)
    paths = analyses.affinity(str(run), device=str(device), tasks=4, samples=2)
    assert np.load(paths[0]).shape == (20, 20)
    clusters = {"cost": "affinity", "affinity": str(paths[0]), "k": 2}
    found = Trainer(tiny(process=process, clusters=clusters)).clusters
    assert set(found.probabilities * 20) <= {0.0, 5.0, 10.0, 15.0, 20.0}
    facts, _ = analyses.negative_transfer(
        str(run), device=str(device), intervals=2, iterations=2, num=12, resamples=2
    )
    assert json.loads(facts.read_text())["boundaries"] == [0, 10, 20]
    about, *_ = analyses.difficulty(str(run), device=str(device), intervals=2, iterations=2)
    assert json.loads(about.read_text())["boundaries"] == [0, 10, 20]
    expert = load_expert(expert_folder(run, 10, 20), str(device))
    half = Trainer(expert.config)
    level, _ = half.timesteps.sample(50, generator=torch.Generator().manual_seed(0))
    assert (level >= half.clusters.distribution.quantile(torch.tensor(0.5))).all()


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_the_expert_takes_over_where_its_interval_begins(tiny, device, process):
    """In what the models are called with: the sampler's own steps fall to the side that their level says."""
    config = tiny(process=process, device="cpu")
    scheduler = build_scheduler(config)
    noise = build_noise(config, scheduler)
    times = noise.model_times(np.array([0, 7, 20]))
    levels = noise.distribution.quantile(torch.tensor([0.3499, 0.3501], dtype=torch.float64))
    told = noise.process.model_time(levels)
    assert float(told[0]) < times[1] < float(told[1])
    sampler = build_sampler(config.sampling, scheduler)
    assert (sampler.timesteps.diff() < 0).all()
    assert ((sampler.timesteps >= times[0]) & (sampler.timesteps <= times[2])).all()
