"""Pictures encoded once into shards of latents, which the source `latents` reads."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._extras import require
from .._files import remove_leftovers, replacing, write_json
from .._progress import open_progress
from .autoencoder import Autoencoder
from .images import ImageData
from .items import Batch, Conditions, Items, UnreadableSamples, as_it_is, read, stacked
from .latent_files import INDEX
from .sources import FileData


def encode(
    data: ImageData | FileData,
    autoencoder: str,
    out: str,
    *,
    batch_size: int = 32,
    shard_size: int = 4096,
    passes: int = 1,
    sample: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    workers: int = 0,
    unreadable: int = 100,
    seed: int = 0,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the latents of all pictures, with their classes, captions or embeddings, and an index.

    Shards are whole or absent, and a call that was stopped goes on after the last one if it is repeated. Pictures
    that the source holds out for validation go to shards of their own, without augmentation. Latents are scaled,
    see `Autoencoder`.

    Args:
        data: the pictures.
        autoencoder: folder of an autoencoder of diffusers.
        out: folder to write; an empty or a new one, or one that a call with the same arguments has begun.
        batch_size: pictures encoded at a time.
        shard_size: pictures of a shard.
        passes: how often the training pictures are encoded, every time with other crops and flips.
        sample: draw from the posterior, not its mean.
        dtype: of the autoencoder and of the latents on disk.
        device: where the autoencoder runs.
        workers: processes that read ahead.
        unreadable: most pictures that may be left out because they cannot be read; each is named.
        seed: of the augmentation and of the draws from the posterior.
        about: what else the index holds and has to be the same where a call goes on: options of the source.

    Returns:
        The index: what was asked for, ``shape`` of a latent, ``shards``, ``unreadable`` pictures, ``complete``.

    Raises:
        ValueError: the folder holds something else, too many pictures cannot be read, or the autoencoder does not
            take them.
    """
    folder = Path(out)
    asked = {
        "autoencoder": str(Path(autoencoder).resolve()),
        "data": data.fingerprint(),
        "num_classes": data.num_classes,
        "shard_size": shard_size,
        "passes": passes,
        "sample": sample,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        **(about or {}),
    }
    index = _begun(folder, asked) or {**asked, "shards": [], "unreadable": {}, "complete": False}
    if index["complete"]:
        return index
    coder = Autoencoder(autoencoder, device, dtype)
    skipped = UnreadableSamples(unreadable, index["unreadable"])
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_json(
        folder / INDEX, index
    )  # whatever happens to the first shard, the folder is known for what it is
    kinds = [("training", data.training, passes, seed), ("validation", data.validation, 1, None)]
    total = sum(times * len(items) for _, items, times, _ in kinds if items is not None)
    with contextlib.closing(open_progress(total, _pictures(index), unit="pictures")) as progress:
        for kind, items, times, augmentation in kinds:
            if items is None:
                continue
            begun = sum(shard["kind"] == kind for shard in index["shards"])
            shards = [*_ranges(0, times * len(items), shard_size)][begun:]
            batches = _batches(items, augmentation, shards, batch_size, workers)
            for number, visits in enumerate(shards, begun):
                file = f"{kind}-{number:05d}.safetensors"
                parts = []
                for start in visits[::batch_size]:
                    batch = next(batches)
                    skipped.add(batch.unreadable)
                    index["unreadable"] |= batch.unreadable
                    if len(batch.x):
                        draw = _generator(f"{seed} {kind} {start}") if sample else None
                        parts.append((coder.encode(batch.x, draw).cpu(), batch.conditioning))
                if parts:
                    index["shape"] = _write(folder / file, parts)
                count = sum(len(z) for z, _ in parts)
                index["shards"].append({"kind": kind, "file": file, "count": count, "pictures": len(visits)})
                write_json(folder / INDEX, index)
                progress.update(_pictures(index), f"{len(skipped.names)} could not be read")
    index["complete"] = True
    write_json(folder / INDEX, index)
    return index


def _begun(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The index of a call that was stopped; None where there is none.

    Raises:
        ValueError: the folder holds something else, or was begun with other arguments.
    """
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return None
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"out: expected a new or empty folder, or latents to go on with, found other files in {folder}"
        )
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    for name, value in asked.items():
        if index.get(name) != value:
            raise ValueError(
                f"{name}: expected {index.get(name)!r}, as {folder} was begun with, found {value!r}"
            )
    return index


def _pictures(index: dict[str, Any]) -> int:
    return sum(shard["pictures"] for shard in index["shards"])


def _ranges(start: int, stop: int, size: int) -> Iterator[range]:
    return (range(each, min(each + size, stop)) for each in range(start, stop, size))


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(seed).getrandbits(63))


class _Readable(Dataset[Batch]):
    """Batches of visits, without the samples that cannot be read."""

    def __init__(self, items: Items, seed: int | None) -> None:
        self.items, self.seed = items, seed

    def __getitems__(self, visits: list[int]) -> Batch:
        unreadable: dict[str, str] = {}
        tried = [read(self.items, visit, self.seed, unreadable) for visit in visits]
        found = [each for each in tried if each is not None]
        if not found:
            return Batch(torch.empty(0), None, unreadable)
        return Batch(torch.stack([x for x, _ in found]), stacked([c for _, c in found]), unreadable)

    def __getitem__(self, visit: int) -> Batch:
        return self.__getitems__([visit])


def _batches(
    items: Items, seed: int | None, shards: list[range], batch_size: int, workers: int
) -> Iterator[Batch]:
    """The batches of some shards, each of which begins with a new one."""
    visits = [[*part] for shard in shards for part in _ranges(shard.start, shard.stop, batch_size)]
    return iter(
        DataLoader(_Readable(items, seed), batch_sampler=visits, num_workers=workers, collate_fn=as_it_is)
    )


def _write(path: Path, parts: list[tuple[Tensor, Conditions]]) -> list[int]:
    """Write a shard; the shape of its latents."""
    tensors = {"latents": torch.cat([z for z, _ in parts]).contiguous()}
    conditions: list[Any] = [each for _, each in parts]
    metadata = None
    if isinstance(conditions[0], list):
        metadata = {"captions": json.dumps(list(itertools.chain(*conditions)))}
    elif conditions[0] is not None:
        tensors["labels" if conditions[0].dim() == 1 else "embeddings"] = torch.cat(conditions)
    with replacing(path) as aside:
        require("safetensors.torch", "train").save_file(tensors, aside, metadata)
    return list(tensors["latents"].shape[1:])
