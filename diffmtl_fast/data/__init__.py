"""Data for training: sources, samples by index, batches in an order that can be resumed, conditioning."""

from __future__ import annotations

from .conditioning import Classes, Conditioning, Embeddings, Text
from .images import ImageData, digits
from .items import Batch, EpochOrder, Items, batches
from .sources import FileData, dataset, image_folder, latents, tars

__all__ = [
    "Batch",
    "Classes",
    "Conditioning",
    "Embeddings",
    "EpochOrder",
    "FileData",
    "ImageData",
    "Items",
    "Text",
    "batches",
    "dataset",
    "digits",
    "image_folder",
    "latents",
    "tars",
]
