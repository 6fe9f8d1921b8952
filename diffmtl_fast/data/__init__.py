"""Data for training: sources, samples by index, batches in an order that can be resumed, conditioning."""

from __future__ import annotations

from .autoencoder import Autoencoder
from .conditioning import Classes, Conditioning, Embeddings, Text
from .encoding import encode
from .images import ImageData, digits
from .items import Batch, EpochOrder, Items, UnreadableSamples, batches
from .latent_files import latents
from .sources import FileData, dataset, image_folder, tars

__all__ = [
    "Autoencoder",
    "Batch",
    "Classes",
    "Conditioning",
    "Embeddings",
    "EpochOrder",
    "FileData",
    "ImageData",
    "Items",
    "Text",
    "UnreadableSamples",
    "batches",
    "dataset",
    "digits",
    "encode",
    "image_folder",
    "latents",
    "tars",
]
