"""The analyses of a run: files, resuming, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffmtl_fast.analysis import task_affinity
from diffmtl_fast.clustering import cluster_timesteps
from diffmtl_fast.train import analysis
from diffmtl_fast.train.checkpoint import checkpoints, load_module
from diffmtl_fast.train.components import build_data, build_model, build_scheduler
from diffmtl_fast.train.errors import UserError
from diffmtl_fast.train.folder import RunFolder
from diffmtl_fast.train.run import train


@pytest.fixture
def run(tiny, tmp_path):
    """A finished run of six iterations, which keeps its last two checkpoints."""
    folder = RunFolder(tmp_path / "run")
    train(tiny(), folder)
    return folder


def test_affinity(run, tiny, tmp_path, device, capsys):
    paths = analysis.affinity(run, str(device), tasks=5, samples=3, batch_size=12)
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
    data, scheduler = build_data(config), build_scheduler(config)
    model = build_model(config, data, device)
    loss, expected = analysis.denoising_loss(data, scheduler, device), []
    for path in checkpoints(run.checkpoints):
        load_module(path, "model", model)
        expected.append(task_affinity(model, loss, cluster_timesteps(20, 4), samples=2).matrix)
    both = np.load(analysis.affinity(run, str(device), tasks=4, samples=2)[0])
    np.testing.assert_array_equal(both, np.mean(expected, axis=0))
    last = np.load(analysis.affinity(run, str(device), path, tasks=4, samples=2)[0])
    np.testing.assert_array_equal(last, expected[-1])


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
        analysis.affinity(run, str(device), **options)


def test_no_checkpoint(tiny, tmp_path, device):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_config(tiny())
    with pytest.raises(UserError, match="expected a checkpoint, found none yet"):
        analysis.affinity(folder, str(device))
