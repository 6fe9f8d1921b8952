"""From names to objects, and what is refused on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffmtl_fast._errors import UserError
from diffmtl_fast.clustering import BetaTime, LaplaceSigma, LogitNormalTime, ModeTime, cluster_snr
from diffmtl_fast.curriculum import (
    DifficultyCurriculum,
    DistributionSampler,
    StratifiedSampler,
    UniformSampler,
)
from diffmtl_fast.train.components import (
    build,
    build_clusters,
    build_data,
    build_model,
    build_scheduler,
    build_timesteps,
    resolve_device,
)
from diffmtl_fast.train.config import Clusters, Component
from diffmtl_fast.train.data import digits


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("nowhere.Thing", {}, "model.path: cannot import 'nowhere.Thing'"),
        ("torch.nn.Nothing", {}, "model.path: cannot import 'torch.nn.Nothing'"),
        ("torch.float32", {}, "model.path: expected a class or function, found dtype"),
        ("torch.nn.Linear", {"in_features": 1}, "model.args: torch.nn.Linear: "),
        (
            "torch.nn.Conv2d",
            {"in_channels": 3, "out_channels": 3, "kernel_size": 1, "groups": 2},
            "model.args: ",
        ),
    ],
)
def test_build_refuses(path, args, message):
    with pytest.raises(UserError) as caught:
        build("model", Component(path, args))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"out_channels": 2}, "model: expected a floating-point output of the images' shape"),
        ({"in_channels": 3}, "model: "),
        ({"num_class_embeds": None}, "model: "),
    ],
)
def test_model_that_does_not_fit_the_data(tiny, args, message):
    config = tiny(model={"args": args})
    with pytest.raises(UserError, match=message):
        build_model(config, digits(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("classes", "dropout", "message"),
    [(9, 0.0, r"10 classes \(index"), (10, 0.1, "10 classes, and of one more for those that are dropped")],
)
def test_classes_without_an_embedding(tiny, classes, dropout, message):
    config = tiny(model={"args": {"num_class_embeds": classes}}, conditioning={"dropout": dropout})
    with pytest.raises(UserError, match=f"model: expected embeddings of {message}"):
        build_model(config, digits(), torch.device("cpu"))


def test_model_that_is_none(tiny):
    with pytest.raises(UserError, match=r"model: expected an nn\.Module, found dict from builtins\.dict"):
        build_model(replace(tiny(), model=Component("builtins.dict")), digits(), torch.device("cpu"))


def test_model_weights_follow_the_seed(tiny, device):
    data = digits()
    first, same, other = (build_model(tiny(seed=seed), data, device) for seed in (1, 1, 2))
    assert torch.equal(first.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


def test_scheduler_and_data_of_another_kind(tiny):
    with pytest.raises(UserError, match=r"scheduler: expected alphas_cumprod, scale_noise or"):
        build_scheduler(replace(tiny(), scheduler=Component("diffusers.KarrasVeScheduler")))
    with pytest.raises(UserError, match=r"data: expected sklearn\.datasets\.load_digits to return ImageData"):
        build_data(replace(tiny(), data=Component("sklearn.datasets.load_digits")))


@pytest.mark.parametrize(
    ("config", "levels", "message"),
    [
        (Clusters(k=5), np.arange(4.0), "clusters: k: expected 1 <= k <= T = 4, found 5"),
        (Clusters(k=2), np.array([1.0, np.nan, 0.0]), "clusters: log_snr"),
        (Clusters(k=2), np.array([1.0, 0.0, 0.5]), "clusters: log_snr"),
        (Clusters(k=2, min_size=3), np.arange(4.0), "clusters: "),
    ],
)
def test_clusters_refuse(config, levels, message):
    with pytest.raises(UserError) as caught:
        build_clusters(config, lambda: levels, len(levels))
    assert str(caught.value).startswith(message)


def test_affinity_clusters_come_from_a_file(tmp_path):
    affinity = np.kron(np.eye(2), np.ones((3, 3)))  # two blocks of like tasks
    np.save(tmp_path / "tas.npy", affinity)
    config = Clusters("affinity", k=2, affinity=str(tmp_path / "tas.npy"))
    assert build_clusters(config, lambda: np.arange(6.0), 6).boundaries.tolist() == [0, 3, 6]
    with pytest.raises(UserError, match=r"affinity: expected \[T, T\] with T = 7"):
        build_clusters(config, lambda: np.arange(7.0), 7)


LEVELS = np.linspace(6.0, -6.0, 20)
TASKS = cluster_snr(LEVELS, 3)


@pytest.mark.parametrize(
    ("sampler", "args", "distribution"),
    [
        ("uniform", {}, None),
        ("stratified", {}, None),
        ("logit_normal", {"mean": 0.5, "std": 2.0}, LogitNormalTime(0.5, 2.0)),
        ("logit_normal", {"logit_mean": 0.5, "logit_std": 2.0}, LogitNormalTime(0.5, 2.0)),
        ("mode", {"mode_scale": 0.7}, ModeTime(0.7)),
        ("range", {"min_timestep": 3, "max_timestep": 9}, None),
        ("range", {"ranges": [[0, 10, 20], [5, 0, 20]]}, None),
        ("speed", {"suppression": 3.0}, None),
        ("loss", {"cells": 4}, None),
        ("beta", {"a": 2.0, "b": 1.0}, BetaTime(2.0, 1.0)),
        ("laplace", {"scale": 3.0}, LaplaceSigma(0.0, 3.0)),
        ("second_moment", {"cells": 4}, None),
    ],
)
@pytest.mark.parametrize("method", ["vanilla", "uw"])
def test_samplers(tiny, method, sampler, args, distribution):
    config = tiny(method=method, timesteps={"sampler": sampler, "args": args})
    built = build_timesteps(config, TASKS, lambda: LEVELS)
    one_task = method == "vanilla" and sampler != "stratified"
    assert built.tasks.boundaries.tolist() == ([0, 20] if one_task else TASKS.boundaries.tolist())
    t = torch.arange(20)
    if distribution is not None:
        log_snr = LEVELS if sampler == "laplace" else None
        expected = DistributionSampler(TASKS, distribution, log_snr=log_snr).density(t)
        torch.testing.assert_close(built.density(t), expected)
    else:
        assert type(built).__name__.lower().startswith(sampler.split("_")[0].replace("second", "losssecond"))


@pytest.mark.parametrize(("interval", "k"), [([0, 20], 1), ([0, 7], 2), ([7, 9], 3), ([19, 20], 2)])
def test_an_expert_sees_its_interval_alone(tiny, interval, k):
    built = build_timesteps(tiny(method="vanilla", timesteps={"interval": interval}), TASKS, lambda: LEVELS)
    assert built.tasks.k == k
    expected = torch.zeros(20, dtype=torch.float64)
    expected[interval[0] : interval[1]] = 1 / (interval[1] - interval[0])
    torch.testing.assert_close(built.density(torch.arange(20)), expected)


def test_an_interval_beyond_the_schedule_is_refused(tiny):
    with pytest.raises(UserError, match=r"timesteps\.interval: expected an end of at most 20, found 21"):
        build_timesteps(tiny(method="vanilla", timesteps={"interval": [0, 21]}), TASKS, lambda: LEVELS)


@pytest.mark.parametrize("method", ["vanilla", "pcgrad"])
def test_samplers_of_the_methods(tiny, method):
    built = build_timesteps(tiny(method=method), TASKS, lambda: LEVELS)
    assert isinstance(built, UniformSampler if method == "vanilla" else StratifiedSampler)


@pytest.mark.parametrize("method", ["vanilla", "pcgrad"])
def test_curriculum(tiny, method):
    options = {"order": "hard_to_easy", "patience": None, "max_length": [1, 2, 3, 4], "smoothing": 0.5}
    config = tiny(method=method, curriculum={**options, "min_delta": 0.1, "clusters": {"k": 4}})
    built = build_timesteps(config, TASKS, lambda: LEVELS)
    assert isinstance(built, DifficultyCurriculum)
    assert built.clusters == cluster_snr(LEVELS, 4)
    assert built.tasks.k == (1 if method == "vanilla" else 3)
    assert built.sampling == ("union" if method == "vanilla" else "tasks")
    assert (built.order, built.patience, built.max_length) == ("hard_to_easy", None, [1, 2, 3, 4])
    assert (built.smoothing, built.min_delta) == (0.5, 0.1)
    union = tiny(method=method, curriculum={"order": "easy_to_hard", "sampling": "union"})
    assert build_timesteps(union, TASKS, lambda: LEVELS).sampling == "union"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": {"sampler": "beta"}}, "timesteps.args: "),
        (
            {"timesteps": {"sampler": "logit_normal", "args": {"std": 0.0}}},
            "timesteps.args: expected a finite",
        ),
        ({"timesteps": {"sampler": "uniform", "args": {"mean": 0.0}}}, "timesteps.args: "),
        (
            {"curriculum": {"order": "easy_to_hard", "clusters": {"k": 21}}},
            "curriculum.clusters: k: expected",
        ),
        ({"curriculum": {"order": "easy_to_hard", "patience": None}}, "curriculum: expected patience or max"),
        ({"curriculum": {"order": "easy_to_hard", "patience": 0}}, "curriculum.patience: expected"),
        ({"curriculum": {"order": "easy_to_hard", "max_length": [1]}}, "curriculum: max_length: expected"),
    ],
)
def test_timesteps_refuse(tiny, changes, message):
    with pytest.raises(UserError) as caught:
        build_timesteps(tiny(**changes), TASKS, lambda: LEVELS)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x93NUMPY\x01\x00"])
def test_files_of_affinities_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "a.npy").write_bytes(content)
    config = Clusters("affinity", k=2, affinity=str(tmp_path / "a.npy"))
    with pytest.raises(UserError, match=r"^clusters\.affinity: cannot read .*a\.npy"):
        build_clusters(config, lambda: np.arange(7.0), 7)


@pytest.mark.parametrize("name", ["cuda:99", "mps:0", "gpu", "", "meta"])
def test_devices_that_are_not_there(name):
    with pytest.raises(UserError, match=r"^device: "):
        resolve_device(name)


def test_devices_that_are_there():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
