"""Every configuration in examples/configs runs, with a model and data small enough for a test."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from diffmtl_fast._errors import UserError
from diffmtl_fast.cli import main
from diffmtl_fast.run.power_average import power_average
from diffmtl_fast.run.trained_denoiser import load_run
from diffmtl_fast.run.training import train
from diffmtl_fast.train import checkpoint, history
from diffmtl_fast.train.components import build
from diffmtl_fast.train.config import from_dict
from diffmtl_fast.train.folder import RunFolder
from diffmtl_fast.train.loop import Trainer

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SMALL_DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
SMALL_UNET = {"block_out_channels": [8, 8], "norm_num_groups": 4}
BLOCKS = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
#: What is made smaller.
MODELS = {
    "edm_unet": SMALL_UNET,
    "flow_matching_unet": SMALL_UNET,
    "flow_matching_dit": SMALL_DIT,
    "lora": SMALL_DIT,
    "latents_dit": {**SMALL_DIT, "sample_size": 4, "num_embeds_ada_norm": 3},
    "image_folder": {**SMALL_UNET, **BLOCKS, "sample_size": 8, "num_class_embeds": 3, "layers_per_block": 1},
    "text_to_image": {
        **SMALL_UNET,
        "sample_size": 8,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    },
}


def save_tiny_encoder(folder):
    """A text encoder with random weights and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "digit", "one"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


def write_latents(folder):
    folder.mkdir()
    save_file({"latents": torch.randn(30, 4, 4, 4), "labels": torch.arange(30) % 3}, folder / "a.safetensors")
    return {"folder": str(folder)}


def write_folder(folder, count=300, broken=5):
    """Pictures in two classes, some of them broken."""
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
        if index < broken:
            path.write_bytes(path.read_bytes()[:40])
    return {"folder": str(folder), "size": 8, "held_out": 0.0}


def write_captioned(folder):
    library = pytest.importorskip("datasets")
    file = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 20, "caption": ["a digit one"] * 20}
    features = library.Features({"image": library.Image(), "caption": library.Value("string")})
    library.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return {"path": str(folder), "size": 8}


def small(name, tmp_path, **changes):
    """The configuration, made small."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    values["model"]["args"] |= MODELS[name]
    values |= {"iterations": 2, "batch_size": 6, "workers": 0, "device": "cpu", "precision": "fp32"}
    values["sampling"] = {**values.get("sampling", {}), "steps": 2}
    values |= {"evaluation": {"num_samples": 0}, "logging": {"every": 1, "tensorboard": False}}
    data = {"latents_dit": write_latents, "image_folder": write_folder, "text_to_image": write_captioned}
    if name in data:
        values["data"]["args"] |= data[name](tmp_path / "data")
    if name == "text_to_image":
        save_tiny_encoder(tmp_path / "text")
        values["conditioning"] |= {"encoder": str(tmp_path / "text"), "max_length": 6}
    if name == "lora":
        pytest.importorskip("peft")
        base = {key: value for key, value in values.items() if key != "compute"}
        values["compute"]["weights"] = str(tmp_path / "base.safetensors")
        model = build("model", from_dict({**base, "sampling": {}}).model)
        checkpoint.save_module(tmp_path / "base.safetensors", model)
    return from_dict(values | changes)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_example_trains_and_draws(tmp_path, name):
    run = RunFolder(tmp_path / "run")
    train(small(name, tmp_path), run)
    lines = history.read(run.log)
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert run.samples.exists()


def test_adapters_of_an_example_change_its_base_no_more_than_they_say(tmp_path):
    """The base stays, the pictures come from a power EMA, and what is saved are the adapters alone."""
    config, run = small("lora", tmp_path), RunFolder(tmp_path / "run")
    train(config, run)
    assert config.accumulate * config.batch_size == 48
    assert run.snapshots().keys() == {2}
    drawn_at_the_end = load_run(str(run.path), None, "cpu").model.state_dict()
    drawn = load_run(str(run.path), None, "cpu", steps=None, sigma_rel=0.12).model
    expected = power_average(run.snapshots(), config.sigma_rels, 2, 0.12)
    for name, parameter in drawn.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-7)
    adapters = load_file(run.model / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters)
    base = load_file(tmp_path / "base.safetensors")
    fresh = build("model", config.model)
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(run.model), fresh)
    assert not peft.set_peft_model_state_dict(fresh, adapters).unexpected_keys
    given = {name: value for name, value in fresh.state_dict().items() if "lora_" in name}
    assert given
    assert all(torch.equal(value, drawn_at_the_end[name]) for name, value in given.items())
    last = load_file(checkpoint.checkpoints(run.checkpoints)[-1] / "model.safetensors")
    frozen = {name.replace(".base_layer", ""): value for name, value in last.items() if "lora_" not in name}
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)


def test_pictures_of_captions(tmp_path, monkeypatch, capsys):
    """Those of the data, or one that is given, which data without captions have no use for."""
    run = RunFolder(tmp_path / "run")
    train(small("text_to_image", tmp_path), run, outputs=False)
    trained = load_run(str(run.path), None, "cpu")
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--run", str(run.path), "--device", "cpu", "--num", "2", "--out", "a.npy"]
    for more, captions in (([], ["a digit one"] * 2), (["--caption", "one"], ["one", "one"])):
        assert main([*command, *more]) == 0
        np.testing.assert_array_equal(np.load("a.npy"), trained.draw(captions, 2, 0))
    train(small("flow_matching_unet", tmp_path), RunFolder(tmp_path / "classes"), outputs=False)
    assert main([*command, "--run", "classes", "--caption", "one"]) == 2
    assert "caption: expected none of a run without captions, found 'one'" in capsys.readouterr().err


def test_too_few_real_pictures_are_told_before_training(tmp_path):
    features = {"num_samples": 8, "features": {"path": "torch.nn.Flatten"}}
    config = small("text_to_image", tmp_path, evaluation=features)  # holds out 1 of 20
    with pytest.raises(UserError, match=r"num_samples: expected 0 for data with fewer than 4 .* found 1"):
        train(config, RunFolder(tmp_path / "run"))
    train(replace(config, evaluation=replace(config.evaluation, num_samples=0)), RunFolder(tmp_path / "run"))
    with pytest.raises(UserError, match=r"evaluation: expected more than 3 held-out real pictures, found 1"):
        load_run(str(tmp_path / "run"), None, "cpu").evaluate(8)


def test_broken_files_are_named_and_counted(tmp_path, caplog):
    config = small("image_folder", tmp_path, batch_size=50, iterations=6)
    run = RunFolder(tmp_path / "run")
    with caplog.at_level(logging.WARNING, "diffmtl_fast"):
        train(config, run)
    named = [record.message for record in caplog.records if "left out" in record.message]
    assert sorted(message.split(",")[0].split("/")[-1] for message in named) == [f"{i}.png" for i in range(5)]
    few = replace(config, unreadable=2)
    with pytest.raises(UserError, match=r"unreadable: expected at most 2 files .* found one more: .*\.png"):
        train(few, RunFolder(tmp_path / "few"))


def test_a_stop_in_the_middle_of_an_epoch_with_workers(tmp_path, monkeypatch):
    """The same weights and the same line of the log as without a stop, read by two processes or by none."""
    options = {"batch_size": 40, "iterations": 4, "checkpoints": {"every": 2}}
    config = small("image_folder", tmp_path, **options, workers=2)
    whole, stopped = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped")
    train(replace(config, workers=0), whole, outputs=False)
    step = Trainer.step

    class Killed(BaseException):
        pass

    def stopping(self, history):
        if self.iteration == 3:
            raise Killed
        step(self, history)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(Killed):
        train(config, stopped, outputs=False)
    monkeypatch.setattr(Trainer, "step", step)
    train(config, stopped, resume=True, outputs=False)
    last = [checkpoint.checkpoints(run.checkpoints)[-1] for run in (whole, stopped)]
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()
