"""Pictures that every method draws from the same noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..run.sampling import balanced_labels
from ..run.trained_denoiser import TrainedDenoiser, load
from ..train import checkpoint
from ..train.config import IN_MEMORY
from .folder import StudyFolder
from .results import Results

MAX_CLASSES = 10


@dataclass(frozen=True)
class Samples:
    """Pictures of one seed.

    Attributes:
        seed: of the runs and of the noise that all begin with.
        pictures: float32 [N, C, H, W] in [-1, 1] by title, the real ones first; a class to a column.
        parameters: of the model.
    """

    seed: int
    pictures: dict[str, Tensor]
    parameters: int


def draw_samples(results: Results, study: StudyFolder) -> Samples | None:
    """Draw a picture of each class with every method's averaged weights.

    They are those of the first seed that all methods have, or else of the first that plain training has.

    Returns:
        The pictures; None where no checkpoint is left of plain training.
    """
    plain = results.cases()[0]
    common = set.intersection(*(set(results.seeds(variant)) for variant in results.cases()))
    seed = min(common or results.seeds(plain))
    found: dict[str, Tensor] = {}
    parameters = 0
    for variant in results.cases():
        run = study.run(variant, seed)
        if seed not in results.seeds(variant) or not checkpoint.checkpoints(run.checkpoints):
            continue
        trained = load(run, replace(run.read_config(), device=results.plan.base.device))
        labels = balanced_labels(
            min(trained.data.num_classes, MAX_CLASSES) or MAX_CLASSES, trained.data.num_classes
        )
        if not found:
            found["real"] = _real(trained, labels)
            parameters = sum(parameter.numel() for parameter in trained.model.parameters())
        count = len(found["real"])
        found[variant.title] = trained.draw(labels, count, seed).cpu()
    return Samples(seed, found, parameters) if found else None


def _real(trained: TrainedDenoiser, labels: Tensor | None) -> Tensor:
    """The first real picture of every class."""
    data = trained.data.images(IN_MEMORY)
    if labels is None or data.train_labels is None:
        return data.train[:MAX_CLASSES]
    of_class = [int((data.train_labels == label).nonzero()[0, 0]) for label in labels.tolist()]
    return data.train[torch.tensor(of_class)]
