"""Pictures to shards of latents, which are read as what the autoencoder gives."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from PIL import Image

from diffmtl_fast._files import write_json
from diffmtl_fast.cli import main
from diffmtl_fast.data import Autoencoder, EpochOrder, ImageData, batches, encode, image_folder, latents

TINY = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 2, "layers_per_block": 1}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
KINDS = {
    "kl": lambda: diffusers.AutoencoderKL(**TINY, **BLOCKS, scaling_factor=0.5, shift_factor=0.25),
    "vq": lambda: diffusers.VQModel(**TINY, **BLOCKS, num_vq_embeddings=8),
    "tiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=2, upsampling_scaling_factor=2,
    ),
    "channels": lambda: diffusers.AutoencoderKL(
        **TINY, **BLOCKS, scaling_factor=1.5, latents_mean=[1.0, -1.0], latents_std=[2.0, 0.5]
    ),
}  # fmt: skip


@pytest.fixture
def autoencoder(tmp_path):
    """Save one of the kinds with random weights; its folder and itself."""

    def make(kind="kl"):
        torch.manual_seed(0)
        model = KINDS[kind]().eval()
        model.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind), model

    return make


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten pictures of different values; one is broken."""
    for index in range(20):
        path = tmp_path / "set" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((9, 8)).point(lambda v, i=index: (v + 12 * i) % 256).convert(
            "RGB"
        ).save(path)
    (tmp_path / "set" / "a" / "04.png").write_bytes(b"broken")
    return tmp_path / "set"


def read(items):
    return [items.item(i, None) for i in range(len(items))]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_scaled_as_pipelines_scale_them(autoencoder, kind):
    place, model = autoencoder(kind)
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    found = Autoencoder(place).encode(x)
    with torch.no_grad():
        raw = model.encode(x)
    expected = {
        "kl": lambda: (raw.latent_dist.mean - 0.25) * 0.5,
        "vq": lambda: raw.latents * 0.18215,
        "tiny": lambda: raw.latents,
        "channels": lambda: (
            1.5
            * (raw.latent_dist.mean - torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
            / torch.tensor([2.0, 0.5]).view(1, 2, 1, 1)
        ),
    }[kind]()
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        decoded = model.decode(raw.latent_dist.mean if kind in ("kl", "channels") else raw.latents).sample
    torch.testing.assert_close(Autoencoder(place).decode(found), decoded.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_a_draw_from_the_posterior_has_its_spread(autoencoder):
    place, model = autoencoder()
    x = torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
    coder, generator = Autoencoder(place), torch.Generator().manual_seed(0)
    drawn = torch.cat([coder.encode(x, generator) for _ in range(400)])
    torch.testing.assert_close(drawn.std(0), posterior.std[0] * 0.5, atol=0, rtol=0.25)


def test_what_is_no_autoencoder_is_refused(tmp_path, autoencoder):
    with pytest.raises(FileNotFoundError, match=r"found no config.json"):
        Autoencoder(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "scheduler" / "scheduler_config.json").rename(tmp_path / "scheduler" / "config.json")
    with pytest.raises(ValueError, match=r"expected an autoencoder of diffusers in .*, found DDPMScheduler"):
        Autoencoder(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"expected pictures of 3 channels, as AutoencoderKL takes, found 1"):
        Autoencoder(autoencoder()[0]).encode(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_becomes_latents(tmp_path, autoencoder, folder, workers):
    place, _ = autoencoder()
    source = image_folder(str(folder), 8, held_out=0.2)
    out = str(tmp_path / "latents")
    index = encode(source, place, out, batch_size=3, shard_size=7, workers=workers)
    assert [*index["unreadable"]] == [str(folder / "a" / "04.png")]
    data, coder = latents(out), Autoencoder(place)
    assert (data.shape, data.num_classes, data.latent) == ((2, 4, 4), 2, True)
    assert data.autoencoder == place
    assert len(data.training) + len(data.validation) == 19
    for ours, theirs in ((data.training, source.training), (data.validation, source.validation)):
        kept = [i for i in range(len(theirs)) if "04.png" not in theirs.name(i)]
        for place_, i in enumerate(kept):
            x, label = theirs.item(i, None)
            z, found = ours.item(place_, None)
            assert found == label
            torch.testing.assert_close(z, coder.encode(x[None])[0], atol=1e-5, rtol=1e-5)
    batch = next(batches(data.training, EpochOrder(len(data.training), 5, 0), workers=workers))
    assert batch.x.shape == (5, 2, 4, 4)
    assert batch.conditioning.dtype == torch.int64


def test_passes_have_crops_and_flips_of_their_own(tmp_path, autoencoder, folder):
    place, _ = autoencoder()
    source = image_folder(str(folder), 8, flip=True, crop=True, held_out=0.2)
    encode(source, place, str(tmp_path / "latents"), passes=3, sample=True, dtype=torch.bfloat16)
    data = latents(str(tmp_path / "latents"))
    found = [z for z, _ in read(data.training)]
    number = len(found) // 3
    assert len(found) == 3 * number
    assert not torch.equal(found[0], found[number])
    assert len(data.validation) in (3, 4)  # once, one may be the broken picture


def test_a_stopped_call_goes_on_to_the_same_bits(tmp_path, autoencoder, folder, monkeypatch):
    place, _ = autoencoder()
    source = image_folder(str(folder), 8, flip=True, held_out=0.2)
    options = {"batch_size": 2, "shard_size": 4, "sample": True}
    whole, out = tmp_path / "whole", tmp_path / "latents"
    encode(source, place, str(whole), **options)
    calls, done = [], Autoencoder.encode

    def stopping(self, *given):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return done(self, *given)

    monkeypatch.setattr(Autoencoder, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        encode(source, place, str(out), **options)
    with pytest.raises(ValueError, match=r"expected all latents in .*, found a part"):
        latents(str(out))
    with pytest.raises(ValueError, match=r"seed: expected 0, as .* was begun with, found 1"):
        encode(source, place, str(out), **options, seed=1)
    kept = (out / "training-00000.safetensors").stat().st_mtime_ns
    encode(source, place, str(out), **options)
    assert (out / "training-00000.safetensors").stat().st_mtime_ns == kept
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_shard_that_the_index_does_not_know_is_written_anew(tmp_path, autoencoder, folder, monkeypatch):
    place, _ = autoencoder()
    source = image_folder(str(folder), 8, held_out=0.0)
    written = []

    def killed(path, index):
        written.append(path)
        if len(written) == 2:  # the first shard is there, the index of it is not
            raise KeyboardInterrupt
        write_json(path, index)

    monkeypatch.setattr("diffmtl_fast.data.encoding.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(source, place, str(tmp_path / "z"), shard_size=8)
    assert (tmp_path / "z" / "training-00000.safetensors").exists()
    (tmp_path / "z" / ".tmp-1-training-00001.safetensors").touch()
    index = encode(source, place, str(tmp_path / "z"), shard_size=8)
    assert [shard["count"] for shard in index["shards"]] == [7, 8, 4]
    assert len(latents(str(tmp_path / "z")).training) == 19
    assert not list((tmp_path / "z").glob(".tmp-*"))


def test_captions_and_embeddings_are_kept(tmp_path, autoencoder):
    place, _ = autoencoder()
    for name, values in (("captions", [f"é {i}" for i in range(5)]), ("embeddings", torch.randn(5, 3, 2))):
        source = _Source(torch.rand(5, 3, 8, 8) * 2 - 1, values)
        encode(source, place, str(tmp_path / name), shard_size=2)
        found = [condition for _, condition in read(latents(str(tmp_path / name)).training)]
        if name == "captions":
            assert found == values
        else:
            assert torch.equal(torch.stack(found), values)


class _Source(ImageData):
    """Pictures in memory with conditions that are no classes."""

    def __init__(self, x, conditions):
        super().__init__(x, None, x, None)
        object.__setattr__(self, "conditions", conditions)

    @property
    def training(self):
        items = super().training
        items.conditions = self.conditions
        return items

    @property
    def validation(self):
        return None


def test_the_command(tmp_path, autoencoder, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place, _ = autoencoder()
    source = [
        "--data.path",
        "diffmtl_fast.data.image_folder",
        "--data.args.folder",
        str(folder),
        "--data.args.size",
        "8",
    ]
    command = [
        "encode",
        *source,
        "--autoencoder",
        place,
        "--out",
        "z",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    assert "z: 19 latents [2, 4, 4]; 1 pictures could not be read" in capsys.readouterr().out
    before = (tmp_path / "z" / "index.json").stat().st_mtime_ns
    assert main(command) == 0  # complete
    assert (tmp_path / "z" / "index.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "z" / "index.json").read_text())["complete"]
    for changes, message in (
        (["--unreadable", "0", "--out", "none"], "unreadable: expected at most 0 files"),
        (["--data.args.flip", "true"], "source: expected {'path': 'diffmtl_fast.data.image_folder'"),
        (["--dtype", "float16"], "dtype: expected 'float32', as z was begun with, found 'float16'"),
        (["--out", "set"], "out: expected a new or empty folder"),
        (["--autoencoder", "set", "--out", "none2"], "found no config.json in set"),
    ):
        capsys.readouterr()
        assert main([*command, *changes]) == 2
        assert message in capsys.readouterr().err
