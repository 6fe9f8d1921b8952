"""Sources of pictures on disk: image folders, datasets of Hugging Face, tar archives."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras import require
from .images import ImageData
from .items import UNREADABLE, Batch, Condition, EpochOrder, Items, Subset, batches, refuse_classes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@dataclass(frozen=True)
class FileData:
    """Training and validation samples that are read as they are needed.

    Attributes:
        training: samples.
        validation: samples that are held out, or None.
        num_classes: C, 0 without classes.
        latent: the samples are latents, not pictures in [-1, 1].
        autoencoder: folder of the autoencoder that they are latents of, or None.
    """

    training: Items
    validation: Items | None
    num_classes: int = 0
    latent: bool = False
    autoencoder: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width, of the first sample that can be read.

        Raises:
            ValueError: none can.
        """
        for index in range(len(self.training)):
            try:
                channels, height, width = self.training.item(index, None)[0].shape
                return channels, height, width
            except UNREADABLE:
                continue
        raise ValueError(f"expected a readable sample, found none among {len(self.training)}")

    def fingerprint(self) -> dict[str, Any]:
        """Count and shape of the training samples, SHA-256 of their names."""
        digest = hashlib.sha256()
        for index in range(len(self.training)):
            digest.update(self.training.name(index).rpartition("/")[2].encode() + b"\0")
        return {"count": len(self.training), "shape": list(self.shape), "sha256": digest.hexdigest()}

    def images(self, limit: int) -> ImageData:
        """The first samples in memory, at most `limit` of each kind, without those that cannot be read."""
        train, labels = _load(self.training, limit)
        test, test_labels = (train, labels) if self.validation is None else _load(self.validation, limit)
        return ImageData(train, labels, test, test_labels)


def extremes(data: ImageData | FileData) -> Batch:
    """Two samples, where classes are known of the first and the last one.

    Raises:
        ValueError: there are no such samples.
    """
    if isinstance(data, ImageData) and data.train_labels is not None:
        chosen = torch.stack([data.train_labels.argmin(), data.train_labels.argmax()])
        return Batch(data.train[chosen], data.train_labels[chosen])
    found = next(batches(data.training, EpochOrder(len(data.training), 2, 0), augment=False))
    if found.x.shape[1:] != data.shape:
        raise ValueError(f"expected samples of one shape, found {[*data.shape]} and {[*found.x.shape[1:]]}")
    refuse_classes(found, data.num_classes)
    held = found.conditioning
    if isinstance(held, Tensor) and held.dim() == 1 and data.num_classes:
        return replace(found, conditioning=held.new_tensor([0, data.num_classes - 1]))
    return found


class Pictures:
    """Turns encoded pictures into samples in [-1, 1].

    RGB and grey pictures of 8 and 16 bits are taken as they are, palettes are resolved, transparency is laid on
    white, and what a camera says of its orientation is followed; other modes, such as CMYK, are refused by name.

    Args:
        size: height and width; the shorter side is scaled to it, the rest cut off.
        channels: 3, or 1 for grey.
        crop: cut off at a random place in training, not around the middle.
        flip: mirror half of the pictures in training.

    Raises:
        ValueError: a size or number of channels out of range.
    """

    def __init__(self, size: int, channels: int = 3, crop: bool = False, flip: bool = False) -> None:
        if size < 1 or channels not in (1, 3):
            raise ValueError(f"expected size >= 1 and 1 or 3 channels, found {size} and {channels}")
        self.size, self.channels, self.crop, self.flip = size, channels, crop, flip

    def __call__(self, file: Any, source: random.Random | None) -> Tensor:
        """Decode a path, an open file or a PIL image, float32 [C, size, size].

        Raises:
            OSError, ValueError: it is no picture, or of another mode.
        """
        pillow = require("PIL.Image", "train")
        try:
            with file if isinstance(file, pillow.Image) else pillow.open(file) as opened:
                require("PIL.ImageOps", "train").exif_transpose(opened, in_place=True)
                picture = self._plain(opened, pillow)
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:  # decoders of damaged files raise struct.error, IndexError, anything
            raise ValueError(f"{type(error).__name__}: {error}") from error
        scale = self.size / min(picture.size)
        width, height = (max(self.size, round(side * scale)) for side in picture.size)
        if (width, height) != picture.size:
            kind = pillow.Resampling.LANCZOS if scale < 1 else pillow.Resampling.BICUBIC
            picture = picture.resize((width, height), kind)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        if source is not None and self.crop:
            left, top = source.randint(0, width - self.size), source.randint(0, height - self.size)
        picture = picture.crop((left, top, left + self.size, top + self.size))
        values = np.array(picture, dtype=np.float32).reshape(self.size, self.size, -1)
        values = values / (0.5 if picture.mode == "F" else 127.5) - 1.0
        if source is not None and self.flip and source.random() < 0.5:
            values = values[:, ::-1]
        x = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))).clamp(-1.0, 1.0)
        return x if len(x) == self.channels else x.expand(self.channels, -1, -1)

    def _plain(self, picture: Any, pillow: Any) -> Any:
        """The picture as RGB or L, or as F with values of 0 to 1."""
        target = "RGB" if self.channels == 3 else "L"
        if picture.mode in _GREY_16:
            values = np.asarray(picture, dtype=np.float32) / 65535.0
            if values.max() > 1.0 or values.min() < 0.0:
                raise ValueError("expected a picture of at most 16 bits, found values beyond 0 to 65535")
            return pillow.fromarray(values)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            behind = pillow.new("RGBA", picture.size, "white")
            return pillow.alpha_composite(behind, picture.convert("RGBA")).convert(target)
        if picture.mode not in ("RGB", "L", "P", "1"):
            raise ValueError(
                f"expected an RGB, RGBA, grey, palette or 16-bit picture, found mode {picture.mode}"
            )
        return picture.convert(target)


@dataclass(frozen=True)
class _Encoded:
    """Samples that a function reads."""

    names: list[str]
    read: Callable[[int, random.Random | None], tuple[Tensor, Condition]]

    def __len__(self) -> int:
        return len(self.names)

    def item(self, index: int, source: random.Random | None) -> tuple[Tensor, Condition]:
        return self.read(index, source)

    def name(self, index: int) -> str:
        return self.names[index]


def image_folder(
    folder: str,
    size: int,
    *,
    channels: int = 3,
    crop: bool = False,
    flip: bool = False,
    held_out: float = 0.05,
) -> FileData:
    """Pictures in folders that are their classes, at any depth; without classes if all lie in the folder itself.

    Args:
        folder: its subfolders' names in alphabetical order are classes 0, 1, ….
        size: see `Pictures`, as for the next three.
        channels: see there.
        crop: see there.
        flip: see there.
        held_out: share of the pictures for validation, chosen at random, the same ones every time.

    Raises:
        ValueError: there are no pictures, or an argument is out of range.
    """
    root, decode = Path(folder), Pictures(size, channels, crop, flip)
    paths = sorted(_pictures(root))
    classes = sorted({path.relative_to(root).parts[0] for path in paths if path.parent != root})
    if classes and any(path.parent == root for path in paths):
        raise ValueError(f"expected pictures in {folder} or in folders of it, found both")
    number = {name: index for index, name in enumerate(classes)}
    labels = [number[path.relative_to(root).parts[0]] if classes else None for path in paths]

    def read(index: int, source: random.Random | None) -> tuple[Tensor, Condition]:
        return decode(paths[index], source), labels[index]

    return hold_out(_Encoded([str(path) for path in paths], read), held_out, len(classes), folder)


def _pictures(root: Path) -> Iterator[Path]:
    """The pictures below a folder, through links too; hidden files and folders are none."""
    for place, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(place, name)


def dataset(
    path: str,
    size: int,
    *,
    image: str = "image",
    condition: str | None = None,
    split: str = "train",
    channels: int = 3,
    crop: bool = False,
    flip: bool = False,
    held_out: float = 0.05,
) -> FileData:
    """A dataset of Hugging Face on disk: what ``save_to_disk`` wrote, or a folder of parquet files or one of them.

    Args:
        path: folder or file.
        size: see `Pictures`, as for channels, crop and flip.
        image: column of the pictures.
        condition: column of captions, classes or embeddings; none by default. Of several captions of a picture one
            is drawn in training, and the first one taken otherwise.
        split: of a dataset that has several.
        channels: see there.
        crop: see there.
        flip: see there.
        held_out: share of the rows for validation.

    Raises:
        ValueError: a column or split is missing, or a class is negative.
    """
    library, place, decode = require("datasets", "text"), Path(path), Pictures(size, channels, crop, flip)
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        rows = library.load_from_disk(path)
        if isinstance(rows, library.DatasetDict):
            if split not in rows:
                raise ValueError(f"split: expected one of {', '.join(rows)}, found {split!r}")
            rows = rows[split]
    else:
        files = [place] if place.is_file() else sorted(place.rglob("*.parquet"))
        if not files:
            raise ValueError(f"expected a dataset or parquet files, found none in {path}")
        rows = library.Dataset.from_parquet([str(file) for file in files])
    for name in (image, condition):
        if name is not None and name not in rows.column_names:
            raise ValueError(f"expected a column among {', '.join(rows.column_names)}, found {name!r}")
    rows = rows.select_columns([name for name in (image, condition) if name is not None])
    rows = rows.cast_column(image, library.Image(decode=False))

    def read(index: int, source: random.Random | None) -> tuple[Tensor, Condition]:
        row = rows[index]
        for name, value in row.items():
            if value is None or value == []:
                raise ValueError(f"expected a value in column {name}, found none")
        content = row[image]["bytes"]
        picture = decode(row[image]["path"] if content is None else io.BytesIO(content), source)
        found = None if condition is None else row[condition]
        if isinstance(found, list) and isinstance(found[0], str):
            return picture, found[0] if source is None else source.choice(found)
        return picture, torch.tensor(found) if isinstance(found, list) else found

    classes = 0
    if condition is not None and isinstance(rows.features[condition], library.ClassLabel):
        classes = rows.features[condition].num_classes
    elif condition is not None and getattr(rows.features[condition], "dtype", "").startswith(("int", "uint")):
        known = [value for value in rows[condition] if value is not None]
        if not known or min(known) < 0:
            raise ValueError(f"expected classes >= 0 in column {condition}, found {min(known, default=None)}")
        classes = int(max(known)) + 1
    return hold_out(
        _Encoded([f"{path} row {row}" for row in range(len(rows))], read), held_out, classes, path
    )


def tars(
    folder: str,
    size: int,
    *,
    channels: int = 3,
    crop: bool = False,
    flip: bool = False,
    held_out: float = 0.05,
) -> FileData:
    """Tar archives in WebDataset's layout: files of one sample share the name up to the first dot.

    A sample is a picture with a caption (``.txt``), or else with a class (``.cls``), if any sample has one; those
    without it then cannot be read. The archives are indexed once and read at random, so that the order of training
    is that of the other sources.

    Args:
        folder: of ``*.tar``.
        size: see `Pictures`, as for the next three.
        channels: see there.
        crop: see there.
        flip: see there.
        held_out: share of the samples for validation.

    Raises:
        ValueError: there are no samples, or an archive or a class cannot be read.
    """
    decode = Pictures(size, channels, crop, flip)
    samples: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for archive in sorted(Path(folder).glob("*.tar")):
        for member in _members(archive):
            _, _, suffix = member.name.rpartition("/")[2].partition(".")
            key = str(archive), member.name[: len(member.name) - len(suffix) - 1]
            samples.setdefault(key, {})[f".{suffix.lower()}"] = member.offset_data, member.size
    usable = {key: parts for key, parts in samples.items() if any(part in SUFFIXES for part in parts)}
    keys, parts_of = [*usable], [*usable.values()]
    kind = next((each for each in (".txt", ".cls") if any(each in parts for parts in parts_of)), None)

    def content(index: int, suffix: str) -> bytes:
        if suffix not in parts_of[index]:
            raise ValueError(f"expected {suffix} beside the picture, found {', '.join(parts_of[index])}")
        offset, length = parts_of[index][suffix]
        with open(keys[index][0], "rb") as file:
            file.seek(offset)
            return file.read(length)

    def read(index: int, source: random.Random | None) -> tuple[Tensor, Condition]:
        suffix = next(part for part in parts_of[index] if part in SUFFIXES)
        found: Condition = None
        if kind is not None:
            found = content(index, kind).decode().strip() if kind == ".txt" else label(index)
        return decode(io.BytesIO(content(index, suffix)), source), found

    def label(index: int) -> int:
        text = content(index, ".cls").decode().strip()
        if not text.isdecimal():
            raise ValueError(f"expected a class >= 0 in {' '.join(keys[index])}.cls, found {text[:20]!r}")
        return int(text)

    with_class = [index for index, parts in enumerate(parts_of) if ".cls" in parts] if kind == ".cls" else []
    classes = 1 + max(map(label, with_class)) if with_class else 0
    return hold_out(_Encoded([f"{archive} {key}" for archive, key in keys], read), held_out, classes, folder)


def _members(archive: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar archive.

    Raises:
        ValueError: it is no archive, or not a whole one.
    """
    try:
        with tarfile.open(archive) as opened:
            yield from (member for member in opened if member.isfile())
    except tarfile.TarError as error:
        raise ValueError(f"expected a whole tar archive in {archive}, found none ({error})") from error


def hold_out(items: Items, held_out: float, classes: int, place: str) -> FileData:
    """Hold out a share of the samples, the same ones every time.

    Raises:
        ValueError: there are no samples, or the share is out of range.
    """
    if not 0.0 <= held_out < 1.0:
        raise ValueError(f"held_out: expected a share from 0 up to 1, found {held_out}")
    count = round(held_out * len(items))
    if len(items) - count < 1:
        raise ValueError(f"expected samples in {place}, found {len(items)}")
    order = np.random.default_rng(0).permutation(len(items))
    validation = Subset(items, np.sort(order[:count])) if count else None
    return FileData(Subset(items, np.sort(order[count:])), validation, classes)


def _load(items: Items, limit: int) -> tuple[Tensor, Tensor | None]:
    found = []
    for index in range(len(items)):
        try:
            found.append(items.item(index, None))
        except UNREADABLE:
            continue
        if len(found) == limit:
            break
    labels = [label for _, label in found]
    whole = all(
        isinstance(label, int) or (isinstance(label, Tensor) and label.dim() == 0) for label in labels
    )
    return torch.stack([x for x, _ in found]), torch.tensor(
        [int(label) for label in labels]  # type: ignore[arg-type]
    ) if whole else None
