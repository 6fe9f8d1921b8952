"""Metrics on distributions whose values are known."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from diffmtl_fast._errors import UserError
from diffmtl_fast.analysis import CleanInception, FrechetDistance, Inception
from diffmtl_fast.analysis.features import Classifier, precision_recall
from diffmtl_fast.run.evaluation import build_features, build_judge
from diffmtl_fast.train.config import Component, Evaluation
from diffmtl_fast.train.data import digits


def test_precision_and_recall():
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((60, 2)), rng.standard_normal((60, 2)) + 100.0
    assert precision_recall(left, left) == (1.0, 1.0)
    assert precision_recall(left, right) == (0.0, 0.0)
    # One of two modes drawn: everything drawn is real, half of what is real is drawn.
    assert precision_recall(np.concatenate([left, right]), left) == (1.0, 0.5)
    assert precision_recall(left, np.concatenate([left, right])) == (0.5, 1.0)


def test_precision_of_points_on_a_line():
    # Radius of the 1st neighbour is 1 at 0, 1, 2 and 8 at 10: the reach is [-1, 3] and [2, 18].
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    drawn = np.array([[-1.5], [-0.5], [2.9], [17.0], [19.0]])
    assert precision_recall(real, drawn, k=1)[0] == pytest.approx(3 / 5)


@pytest.fixture(scope="module")
def data():
    return digits()


def test_classifier_knows_the_digits(data):
    classifier = Classifier(data.train, data.train_labels)
    assert classifier.agreement(data.test, data.test_labels) > 0.95
    features = classifier.features(data.test)
    assert features.shape == (360, 64)
    # The output layer on these features is the classifier itself.
    logits = features @ classifier._net.coefs_[-1] + classifier._net.intercepts_[-1]
    assert np.array_equal(logits.argmax(1), classifier._net.predict(data.test.flatten(1).numpy()))


def test_real_images_meet_the_floor_and_noise_the_ceiling(data):
    figures = build_judge(data, Evaluation(), torch.device("cpu")).evaluate(
        data.test, data.test_labels, seed=0
    )
    assert figures["samples"] == figures["floor"]
    assert figures["floor"]["frechet_distance"] < 2.0
    assert figures["floor"]["precision"] > 0.85
    assert figures["ceiling"]["frechet_distance"] > 50 * figures["floor"]["frechet_distance"]
    assert figures["ceiling"]["precision"] == 0.0
    assert figures["ceiling"]["class_agreement"] < 0.3


def test_features_by_import_path(data):
    """Those of torch.nn.Flatten are the pixels."""
    judge = build_judge(
        data, Evaluation(features=Component("torch.nn.Flatten"), num_real=1000), torch.device("cpu")
    )
    assert np.array_equal(judge.real, data.train[:1000].flatten(1).double().numpy())
    figures = judge.evaluate(data.test, data.test_labels, seed=0)
    assert figures["samples"] == figures["floor"]
    assert set(figures["floor"]) == {"frechet_distance", "precision", "recall"}
    expected = FrechetDistance(judge.real)(data.test.flatten(1).double().numpy())
    assert figures["samples"]["frechet_distance"] == round(expected, 4)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Component("torch.nn.Identity"), r"expected finite features \[4, D\], found \[4, 1, 8, 8\]"),
        (
            Component("torch.nn.Conv2d", {"in_channels": 3, "out_channels": 1, "kernel_size": 1}),
            "expected input",
        ),
    ],
)
def test_what_gives_no_features_is_refused(component, message):
    with pytest.raises(UserError, match=rf"evaluation\.features: .*{message}"):
        build_features(component, torch.device("cpu"))(torch.zeros(4, 1, 8, 8))


@pytest.mark.parametrize("name", ["Inception", "CleanInception"])
def test_absent_weights_are_told_where_to_go(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"expected the weights of Inception v3 in .*/checkpoints/.*; put .* there, from"
    ):
        build_features(Component(f"diffmtl_fast.analysis.{name}"), torch.device("cpu"))


def test_inception_gets_what_its_library_takes(tmp_path, monkeypatch):
    """Stand-ins for the networks of torch-fidelity and clean-fid, which show their input."""

    class Fidelity(torch.nn.Module):
        def __init__(self, name, features, weights):
            super().__init__()
            assert (name, features, weights) == ("inception-v3-compat", ["2048"], str(tmp_path / "a.pth"))

        def forward(self, x):
            assert (x.dtype, x.shape[1]) == (torch.uint8, 3)
            return (x.flatten(1).float(),)

    class Clean(torch.nn.Module):
        def __init__(self, folder, download):
            super().__init__()
            assert (folder, download) == (str(tmp_path), False)

        def forward(self, x):
            return x.mean((2, 3))

    def make_resizer(*how):
        assert how == ("PIL", False, "bicubic", (299, 299))
        return lambda array: np.ones((299, 299, 3), np.float32) * array.mean()

    for path, parts in {
        "torch_fidelity.feature_extractor_inceptionv3": {"FeatureExtractorInceptionV3": Fidelity},
        "cleanfid.inception_torchscript": {"InceptionV3W": Clean},
        "cleanfid.resize": {"make_resizer": make_resizer},
    }.items():
        monkeypatch.setitem(sys.modules, path.partition(".")[0], types.ModuleType(path.partition(".")[0]))
        monkeypatch.setitem(sys.modules, path, types.SimpleNamespace(**parts))
    for name in ("a.pth", "inception-2015-12-05.pt"):
        (tmp_path / name).touch()
    x = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert Inception(str(tmp_path / "a.pth"))(x).tolist() == [[float(v)] * 12 for v in (0, 128, 255)]
    found = CleanInception(str(tmp_path / "inception-2015-12-05.pt"))(x)
    assert found.tolist() == [[float(v)] * 3 for v in (0, 128, 255)]
    with pytest.raises(ValueError, match="expected pictures of 1 or 3 channels, found 4"):
        Inception(str(tmp_path / "a.pth"))(x.expand(3, 4, 2, 2))
