"""Latents on disk, as `diffmtl-fast encode` or other programs write them."""

from __future__ import annotations

import bisect
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._extras import require
from .items import Condition, Items
from .sources import FileData, hold_out

#: What `diffmtl-fast encode` writes beside the shards.
INDEX = "index.json"


def latents(folder: str, *, autoencoder: str | None = None, held_out: float = 0.05) -> FileData:
    """Latents computed beforehand: what `diffmtl-fast encode` wrote, or files of other programs.

    They are read as they are needed, so that they need not fit into memory.

    Args:
        folder: of ``*.safetensors``, each with ``latents`` [n, C, H, W] and, if there are any, ``labels`` int64
            [n] or ``embeddings`` [n, L, D]; or of ``*.npy``, each [n, C, H, W], with ``labels.npy`` int64 of all
            in the order of their names. ``captions.jsonl`` holds a string a line, in the same order.
        autoencoder: folder of the autoencoder, for pictures of what is drawn; by default that of `encode`, "" for
            none.
        held_out: share of the latents for validation, where `encode` did not hold out some.

    Raises:
        ValueError: there are none, or not all that `encode` was to write.
    """
    root = Path(folder)
    if (root / INDEX).is_file():
        return _encoded(root, autoencoder)
    shards = sorted(root.glob("*.safetensors"))
    blocks, conditions = _read_shards(shards)
    blocks += [
        np.load(file, mmap_mode="c") for file in sorted(root.glob("*.npy")) if file.name != "labels.npy"
    ]
    if (root / "labels.npy").is_file():
        conditions = np.load(root / "labels.npy")
    if (root / "captions.jsonl").is_file():
        conditions = [json.loads(line) for line in (root / "captions.jsonl").read_text().splitlines()]
    items = _Latents(folder, _Joined(blocks), conditions)
    classes = int(conditions.max()) + 1 if isinstance(conditions, np.ndarray) and len(conditions) else 0
    return replace(hold_out(items, held_out, classes, folder), latent=True, autoencoder=autoencoder or None)


def _encoded(root: Path, autoencoder: str | None) -> FileData:
    """What `encode` wrote, as its index says."""
    index = json.loads((root / INDEX).read_text())
    if not index["complete"]:
        raise ValueError(f"expected all latents in {root}, found a part; the same call of `encode` goes on")
    parts: dict[str, Items | None] = {}
    for kind in ("training", "validation"):
        files = [shard["file"] for shard in index["shards"] if shard["kind"] == kind and shard["count"]]
        blocks, conditions = _read_shards([root / file for file in files])
        parts[kind] = _Latents(f"{root} {kind}", _Joined(blocks), conditions) if files else None
    if parts["training"] is None:
        raise ValueError(f"expected samples in {root}, found none for training")
    chosen = index["autoencoder"] if autoencoder is None else autoencoder or None
    return FileData(parts["training"], parts["validation"], index["num_classes"], True, chosen)


def _read_shards(paths: list[Path]) -> tuple[list[Any], Any]:
    """The latents of .safetensors files, and their labels (an array), captions or embeddings, if there are any."""
    blocks: list[Any] = []
    labels: list[Any] = []
    embeddings: list[Any] = []
    captions: list[str] = []
    for path in paths:
        opened = require("safetensors", "train").safe_open(path, "pt")
        blocks.append(_Lazy(opened.get_slice("latents")))
        if "labels" in opened.keys():  # noqa: SIM118, it is no mapping
            labels.append(opened.get_tensor("labels").numpy())
        if "embeddings" in opened.keys():  # noqa: SIM118
            embeddings.append(_Lazy(opened.get_slice("embeddings")))
        captions += json.loads((opened.metadata() or {}).get("captions", "[]"))
    return blocks, np.concatenate(labels) if labels else captions or (
        _Joined(embeddings) if embeddings else None
    )


class _Latents:
    """Latents and what they are conditioned on, by index."""

    def __init__(self, folder: str, x: Sequence[Any], conditions: Any) -> None:
        if conditions is not None and len(conditions) != len(x):
            raise ValueError(f"expected {len(x)} labels, captions or embeddings, found {len(conditions)}")
        self.folder, self.x, self.conditions = folder, x, conditions

    def __len__(self) -> int:
        return len(self.x)

    def item(self, index: int, source: random.Random | None) -> tuple[Tensor, Condition]:
        x = torch.as_tensor(self.x[index]).to(torch.float32, copy=True)
        if not x.isfinite().all():
            raise ValueError("expected finite values, found NaN or infinity")
        found = None if self.conditions is None else self.conditions[index]
        return x, int(found) if isinstance(found, np.integer) else found

    def name(self, index: int) -> str:
        return f"{self.folder} latent {index}"


class _Lazy:
    """The rows of a tensor in a .safetensors file."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.count = rows, rows.get_shape()[0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index : index + 1][0]


class _Joined(Sequence[Any]):
    """Sequences one after the other."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, self.ends = parts, list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][index - self.ends[part] + len(self.parts[part])]
