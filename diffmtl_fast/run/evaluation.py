"""What judges the pictures of a run: the features that its configuration names, of its real data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._errors import UserError, blame
from ..analysis import Judge
from ..data.items import Items, read
from ..train.components import Data, build
from ..train.config import IN_MEMORY, Component, Evaluation
from .sampling import build_decoder

Array = NDArray[np.float64]
#: Pictures whose features are taken at a time.
TOGETHER = 64


def build_judge(data: Data, config: Evaluation, device: torch.device) -> Judge:
    """The judge of data; real latents are decoded, so that what the autoencoder loses counts for none.

    Args:
        data: the real samples.
        config: names the features.
        device: where a network computes them.

    Raises:
        UserError: the features cannot be computed, or there are too few real samples.
    """
    decode = build_decoder(data, device) or torch.Tensor.cpu
    if config.features.path == "auto":
        images = data.images(IN_MEMORY)
        assert images.train_labels is not None
        assert images.test_labels is not None
        with blame("evaluation"):
            return Judge.by_classifier(
                decode(images.train), images.train_labels, decode(images.test), images.test_labels
            )
    features = build_features(config.features, device)

    def of(items: Items) -> Array:
        return np.concatenate([features(decode(part)) for part in _readable(items, config.num_real)])

    with blame("evaluation"):
        return Judge(features, of(data.training), of(data.validation or data.training))


def build_features(config: Component, device: torch.device) -> Callable[[Tensor], Array]:
    """The function from pictures to features that an import path names.

    Raises:
        UserError: it cannot be built; when called, it fails or gives something else than finite [N, D].
    """
    network = build("evaluation.features", config)
    if isinstance(network, nn.Module):
        network = network.eval().to(device)

    @torch.no_grad()
    def features(pictures: Tensor) -> Array:
        with blame("evaluation.features"):
            parts = [network(part.to(device)) for part in pictures.split(TOGETHER)]
            found = torch.cat([torch.as_tensor(part).detach().cpu().double() for part in parts])
        if found.shape[:1] != pictures.shape[:1] or found.dim() != 2 or not found.isfinite().all():
            raise UserError(
                f"evaluation.features: expected finite features [{len(pictures)}, D], found {list(found.shape)}"
                f"{'' if found.isfinite().all() else ' with NaN or infinity'}"
            )
        return found.numpy()

    return features


def _readable(items: Items, limit: int) -> Iterator[Tensor]:
    """The first samples of a source that can be read, float32 [n, C, H, W] each."""
    samples = (read(items, index, None, {}) for index in range(len(items)))
    found = itertools.islice((sample[0] for sample in samples if sample is not None), limit)
    while part := [*itertools.islice(found, TOGETHER)]:
        yield torch.stack(part)


def table(metrics: Mapping[str, Any]) -> str:
    """The metrics of `Judge.evaluate` as lines of text."""
    kinds = ("samples", "floor", "ceiling")
    lines = [f"{'':18}" + "".join(f"{kind:>10}" for kind in kinds)]
    for name in metrics["samples"]:
        values = "".join(f"{metrics[kind][name]:10.4f}" for kind in kinds)
        lines.append(f"{name.replace('_', ' '):18}{values}")
    return "\n".join(lines)
