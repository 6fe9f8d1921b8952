"""``diffmtl-fast encode``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch

from .. import data as sources
from .._errors import blame
from .._number_types import NonNegativeInt, PositiveInt, Seed, Size
from ..train.components import build, resolve_device
from ..train.config import Component


def encode(
    data: Component,
    autoencoder: str,
    out: str,
    batch_size: Size = 32,
    shard_size: Size = 4096,
    passes: PositiveInt = 1,
    sample: bool = False,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    device: str = "auto",
    workers: NonNegativeInt = 0,
    unreadable: NonNegativeInt = 100,
    seed: Seed = 0,
) -> None:
    """Encode pictures into latents, which `train` reads by --data.path diffmtl_fast.data.latents.

    A call that was stopped goes on where it was if it is repeated.

    Args:
        data: Pictures, as for train
        autoencoder: folder of an autoencoder of diffusers
        out: folder to write
        batch_size: pictures encoded at a time
        shard_size: pictures of a file
        passes: how often the training pictures are encoded, every time with other crops and flips
        sample: draw from the autoencoder's posterior, not its mean
        dtype: of the autoencoder and of what is written
        device: auto, cpu, cuda or cuda:N
        workers: processes that read ahead
        unreadable: most pictures that may be left out because they cannot be read; each is named
        seed: of crops, flips and draws from the posterior
    """
    source = data if isinstance(data, Component) else Component(**data)
    pictures: Any = build("data", source)
    with blame("encode"):
        index = sources.encode(
            pictures,
            autoencoder,
            out,
            batch_size=batch_size,
            shard_size=shard_size,
            passes=passes,
            sample=sample,
            dtype=getattr(torch, dtype),
            device=resolve_device(device),
            workers=workers,
            unreadable=unreadable,
            seed=seed,
            about={"source": asdict(source)},
        )
    count = sum(shard["count"] for shard in index["shards"])
    print(f"{out}: {count:,} latents {index['shape']}; {len(index['unreadable'])} pictures could not be read")
