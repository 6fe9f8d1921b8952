"""Pictures encoded, trained on, drawn, decoded and judged."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffmtl_fast._errors import UserError
from diffmtl_fast.cli import main
from diffmtl_fast.data import Autoencoder, encode, image_folder, latents
from diffmtl_fast.run.trained_denoiser import load
from diffmtl_fast.run.training import train
from diffmtl_fast.train.folder import RunFolder


@pytest.fixture
def encoded(tmp_path):
    """A tiny autoencoder, and forty encoded pictures of two classes."""
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    rng = np.random.default_rng(0)
    for index in range(40):
        path = tmp_path / "set" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    encode(image_folder(str(tmp_path / "set"), 16, held_out=0.2), str(tmp_path / "vae"), str(tmp_path / "z"))
    return tmp_path / "z"


def small(tiny, folder, **changes):
    model = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_class_embeds": 2}
    data = {"path": "diffmtl_fast.data.latents", "args": {"folder": str(folder), **changes.pop("args", {})}}
    return tiny(iterations=1, model={"args": model}, data=data, **changes)


@pytest.mark.parametrize("features", ["auto", "torch.nn.Flatten"])
def test_what_is_drawn_is_decoded_and_judged(tiny, encoded, tmp_path, features):
    run = RunFolder(tmp_path / "run")
    config = small(tiny, encoded, evaluation={"num_samples": 8, "features": {"path": features}})
    train(config, run)
    with Image.open(run.samples) as picture:
        assert picture.convert("RGB").getcolors(100_000) is not None
    metrics = json.loads(run.metrics.read_text())
    assert metrics["num_samples"] == 8
    assert ("class_agreement" in metrics["samples"]) == (features == "auto")
    trained, labels = load(run, config), torch.arange(4) % 2
    pictures = trained.draw(labels, 4, 0)
    assert pictures.shape == (4, 3, 16, 16)
    undecoded = load(run, small(tiny, encoded, args={"autoencoder": ""})).draw(labels, 4, 0)
    assert undecoded.shape == (4, 4, 8, 8)
    assert undecoded.abs().max() > 1  # latents are not cut
    torch.testing.assert_close(Autoencoder(encoded.parent / "vae").decode(undecoded), pictures)
    if features != "auto":
        real = torch.stack([latents(str(encoded)).training.item(i, None)[0] for i in range(32)])
        decoded = Autoencoder(encoded.parent / "vae").decode(real).flatten(1).double()
        assert np.allclose(trained.judge().real, decoded, atol=1e-5)


def test_an_autoencoder_that_moved_is_named_before_training(tiny, encoded, tmp_path):
    (encoded.parent / "vae").rename(tmp_path / "elsewhere")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"data\.args.autoencoder: expected an autoencoder of diffusers, found no"
    ):
        train(small(tiny, encoded), run)
    assert not run.path.exists()
    train(small(tiny, encoded, args={"autoencoder": str(tmp_path / "elsewhere")}), run)
    assert run.samples.exists()


def test_sample_writes_decoded_pictures(tiny, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "run")
    train(small(tiny, encoded), run, outputs=False)
    assert yaml.safe_load(run.config.read_text())["data"]["args"] == {"folder": str(encoded)}
    assert main(["sample", "--run-dir", "run", "--num", "3", "--out", "a.npy"]) == 0
    assert np.load("a.npy").shape == (3, 3, 16, 16)


def test_data_without_classes_are_judged_by_features_of_others(tiny, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for index in range(30):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "set" / f"{index}.png")
    data = {
        "path": "diffmtl_fast.data.image_folder",
        "args": {"folder": str(tmp_path / "set"), "size": 8, "channels": 1, "held_out": 0.3},
    }
    options = {"iterations": 1, "data": data, "model": {"args": {"num_class_embeds": None}}}
    with pytest.raises(UserError, match=r"evaluation\.num_samples: expected 0 for data without labels"):
        train(tiny(**options, evaluation={"num_samples": 6}), RunFolder(tmp_path / "none"))
    run = RunFolder(tmp_path / "run")
    train(tiny(**options, evaluation={"num_samples": 6, "features": {"path": "torch.nn.Flatten"}}), run)
    assert set(json.loads(run.metrics.read_text())["floor"]) == {"frechet_distance", "precision", "recall"}
