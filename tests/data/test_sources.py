"""Sources on disk: every format gives the samples that were written, bad files are named."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffmtl_fast.data import EpochOrder, batches, dataset, image_folder, latents, tars
from diffmtl_fast.data.sources import Pictures


@pytest.fixture
def folder(tmp_path):
    """Two classes of six pictures, every picture of one value; one file is broken."""
    for index in range(12):
        path = tmp_path / "set" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 8), (20 * index,) * 3).save(path)
    (tmp_path / "set" / "a" / "04.png").write_bytes(b"broken")
    return tmp_path / "set"


def read(items):
    return [items.item(i, None) for i in range(len(items))]


def test_a_folder_of_pictures(folder):
    data = image_folder(str(folder), 4, held_out=0.25)
    assert (data.shape, data.num_classes) == ((3, 4, 4), 2)
    assert (len(data.training), len(data.validation)) == (9, 3)
    seen = {}
    for items in (data.training, data.validation):
        for index in range(len(items)):
            if "04.png" not in items.name(index):
                x, label = items.item(index, None)
                seen[round(float((x[0, 0, 0] + 1) * 127.5) / 20)] = label
    assert seen == {index: index % 2 for index in range(12) if index != 4}


def test_unreadable_samples_are_named_and_replaced(folder):
    data = image_folder(str(folder), 4, held_out=0.0)
    batch = next(batches(data.training, EpochOrder(12, 12, 0)))
    assert batch.x.shape == (12, 3, 4, 4)
    ((name, reason),) = batch.unreadable.items()
    assert name.endswith("a/04.png")
    assert "cannot identify" in reason


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (255, 0, 0), [1.0, -1.0, -1.0]),
        ("L", 255, [1.0, 1.0, 1.0]),
        ("RGBA", (0, 0, 0, 0), [1.0, 1.0, 1.0]),  # transparent: white
        ("P", 0, [-1.0, -1.0, -1.0]),
        ("1", 1, [1.0, 1.0, 1.0]),
        ("I;16", 65535, [1.0, 1.0, 1.0]),
        ("I;16", 0, [-1.0, -1.0, -1.0]),
    ],
)
def test_modes(tmp_path, mode, value, expected):
    Image.new(mode, (5, 5), value).save(tmp_path / "a.png")
    x = Pictures(3)(tmp_path / "a.png", None)
    torch.testing.assert_close(x[:, 1, 1], torch.tensor(expected))


def test_other_modes_are_refused_by_name(tmp_path):
    Image.new("CMYK", (5, 5)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="found mode CMYK"):
        Pictures(3)(tmp_path / "a.jpg", None)


def test_crop_and_flip_follow_the_source(tmp_path):
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    decode = Pictures(8, 1, flip=True)
    found = {decode(tmp_path / "a.png", random.Random(i))[0, 0, 0].item() for i in range(20)}
    assert len(found) == 2
    assert torch.equal(
        decode(tmp_path / "a.png", random.Random(3)), decode(tmp_path / "a.png", random.Random(3))
    )
    wide = Image.fromarray(np.tile(values, (1, 2)))
    wide.save(tmp_path / "b.png")
    cropped = Pictures(8, 1, crop=True)
    assert len({cropped(tmp_path / "b.png", random.Random(i))[0, 0, 0].item() for i in range(20)}) > 2


def png(value):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_a_dataset_of_hugging_face(tmp_path, saved):
    library = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": png(10 * i), "path": None} for i in range(8)],
        "caption": [f"grey {i}" for i in range(8)],
    }
    features = library.Features({"image": library.Image(), "caption": library.Value("string")})
    table = library.Dataset.from_dict(rows, features=features)
    if saved == "disk":
        table.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        table.to_parquet(tmp_path / "set" / "a.parquet")
    data = dataset(str(tmp_path / "set"), 4, channels=1, condition="caption", held_out=0.0)
    for i, (x, caption) in enumerate(read(data.training)):
        assert caption == f"grey {i}"
        assert float(x.mean()) == pytest.approx(10 * i / 127.5 - 1)
    with pytest.raises(ValueError, match="expected a column among image, caption, found 'text'"):
        dataset(str(tmp_path / "set"), 4, condition="text")


def test_latents(tmp_path):
    x = torch.randn(7, 4, 2, 2)
    save_file({"latents": x[:3], "labels": torch.tensor([0, 1, 2])}, tmp_path / "a.safetensors")
    save_file({"latents": x[3:], "labels": torch.tensor([1, 1, 0, 0])}, tmp_path / "b.safetensors")
    data = latents(str(tmp_path), held_out=0.0)
    assert (data.shape, data.num_classes) == ((4, 2, 2), 3)
    found = read(data.training)
    assert torch.equal(torch.stack([each for each, _ in found]), x)
    assert [int(label) for _, label in found] == [0, 1, 2, 1, 1, 0, 0]
    other = tmp_path / "npy"
    other.mkdir()
    np.save(other / "a.npy", x.numpy())
    (other / "captions.jsonl").write_text("".join(json.dumps(f"c{i}") + "\n" for i in range(7)))
    again = read(latents(str(other), held_out=0.0).training)
    assert [caption for _, caption in again] == [f"c{i}" for i in range(7)]
    np.save(other / "labels.npy", np.arange(3))
    (other / "captions.jsonl").unlink()
    with pytest.raises(ValueError, match="expected 7 labels, captions or embeddings, found 3"):
        latents(str(other))


def write_tar(path, samples):
    """Pictures by number, of grey 20 * number, each with other files."""
    with tarfile.open(path, "w") as tar:
        for number, more in samples.items():
            for suffix, content in {"png": png(20 * number), **more}.items():
                info = tarfile.TarInfo(f"x/{number:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_a_first_sample_without_a_caption_does_not_hide_the_others(tmp_path):
    write_tar(tmp_path / "a.tar", {0: {}, 1: {"txt": b"one"}})
    found = tars(str(tmp_path), 4, channels=1, held_out=0.0).training
    assert found.item(1, None)[1] == "one"
    with pytest.raises(ValueError, match=r"expected \.txt beside the picture, found \.png"):
        found.item(0, None)


@pytest.mark.parametrize("kind", ["txt", "cls"])
def test_tar_archives(tmp_path, kind):
    for archive in range(2):
        numbers = range(3 * archive, 3 * archive + 3)
        write_tar(tmp_path / f"{archive}.tar", {n: {kind: str(n).encode()} for n in numbers})
    data = tars(str(tmp_path), 4, channels=1, held_out=0.0)
    assert data.num_classes == (6 if kind == "cls" else 0)
    for i, (x, found) in enumerate(read(data.training)):
        assert found == (str(i) if kind == "txt" else i)
        assert float(x.mean()) == pytest.approx(20 * i / 127.5 - 1)


def test_nothing_there(tmp_path):
    for source in (image_folder, tars):
        with pytest.raises(ValueError, match="expected samples in"):
            source(str(tmp_path), 4)
    with pytest.raises(ValueError, match="held_out: expected a share"):
        image_folder(str(tmp_path), 4, held_out=1.0)


@pytest.mark.parametrize("damage", ["cut", "bomb", "strange"])
def test_whatever_a_decoder_raises_is_named(tmp_path, damage, monkeypatch):
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    if damage == "cut":
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    elif damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    else:
        monkeypatch.setattr(Image.Image, "convert", lambda *_: struct.unpack("I", b""))
    with pytest.raises(
        (OSError, ValueError), match={"bomb": "DecompressionBomb", "strange": "error: unpack"}.get(damage)
    ):
        Pictures(4)(tmp_path / "a.png", None)


def test_values_beyond_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((5, 5), 70_000, dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="expected a picture of at most 16 bits"):
        Pictures(3)(tmp_path / "a.tif", None)


def test_the_orientation_of_a_camera_is_followed(tmp_path):
    picture = Image.linear_gradient("L").resize((8, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.rotate(180).save(tmp_path / "a.png", exif=exif)
    picture.save(tmp_path / "b.png")
    decode = Pictures(8, 1)
    assert torch.equal(decode(tmp_path / "a.png", None), decode(tmp_path / "b.png", None))


def test_links_are_followed_and_hidden_files_are_not(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(folder / "a")
    (tmp_path / "linked" / ".b").symlink_to(folder / "b")
    (folder / "a" / "._00.png").write_bytes(b"")
    data = image_folder(str(tmp_path / "linked"), 4, held_out=0.0)
    assert (len(data.training), data.num_classes) == (6, 1)


def test_several_captions_and_missing_values(tmp_path):
    library = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": png(10), "path": None}, None, {"bytes": png(10), "path": None}],
        "text": [["one", "two"], ["three"], []],
        "number": [3, 0, None],
    }
    features = library.Features(
        {
            "image": library.Image(),
            "text": library.List(library.Value("string")),
            "number": library.Value("int64"),
        }
    )
    library.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    items = dataset(str(tmp_path / "a.parquet"), 4, condition="text", held_out=0.0).training
    assert items.item(0, None)[1] == "one"
    assert {items.item(0, random.Random(i))[1] for i in range(20)} == {"one", "two"}
    with pytest.raises(ValueError, match="expected a value in column image"):
        items.item(1, None)
    with pytest.raises(ValueError, match="expected a value in column text"):
        items.item(2, None)
    labelled = dataset(str(tmp_path / "a.parquet"), 4, condition="number", held_out=0.0)
    assert (labelled.num_classes, labelled.training.item(0, None)[1]) == (4, 3)


def test_damaged_archives_are_named(tmp_path):
    def write(name, members):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    write("a.tar", [("1.png", png(0)), ("1.cls", b"1\n"), ("2.png", png(0))])
    data = tars(str(tmp_path), 4, held_out=0.0)
    assert data.num_classes == 2
    with pytest.raises(ValueError, match=r"expected \.cls beside the picture, found \.png"):
        data.training.item(1, None)
    write("b.tar", [("3.png", png(0)), ("3.cls", b"cat")])
    with pytest.raises(ValueError, match=r"expected a class >= 0 in .*b\.tar 3\.cls, found 'cat'"):
        tars(str(tmp_path), 4)
    (tmp_path / "b.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"expected a whole tar archive in .*b\.tar"):
        tars(str(tmp_path), 4)
