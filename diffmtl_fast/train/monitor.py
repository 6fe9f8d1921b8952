"""What is looked at during training beside the losses of its batches: held-out losses, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .._errors import UserError, blame
from ..data import EpochOrder, UnreadableSamples, batches
from .components import denoise, prediction
from .sinks import Sink

if TYPE_CHECKING:
    from .loop import Trainer

PICTURES = 16  # drawn at a time


class Monitor:
    """Measures the averaged weights every so many iterations; training itself does not change by it.

    Args:
        trainer: whose weights are measured.
        sinks: receive the pictures.
        draw: draws so many pictures [N, C, H, W] in [-1, 1] with the averaged weights.

    Raises:
        UserError: losses are asked for of held-out samples that there are none of.
    """

    def __init__(self, trainer: Trainer, sinks: Sequence[Sink], draw: Callable[[int], Tensor]) -> None:
        self._trainer, self._sinks, self._draw = trainer, sinks, draw
        self._held_out = HeldOutLoss(trainer) if trainer.config.evaluation.validation_every else None

    def __call__(self, iteration: int) -> dict[str, Any]:
        """What is due at an iteration: ``validation`` [K] for the log; pictures go to the sinks."""
        config, figures = self._trainer.config, {}
        if self._held_out is not None and self._due(config.evaluation.validation_every, iteration):
            figures["validation"] = self._held_out(self._trainer.ema.model).tolist()
        if self._sinks and self._due(config.logging.pictures_every, iteration):
            pictures = self._draw(PICTURES)
            if pictures.shape[1] not in (1, 3):  # no colours: latents, for example
                pictures = pictures[:, :1]
            for sink in self._sinks:
                sink.pictures(((pictures + 1) / 2).clamp(0, 1), iteration)
        return figures

    def _due(self, every: int, iteration: int) -> bool:
        return every > 0 and (iteration % every == 0 or iteration == self._trainer.config.iterations)


class HeldOutLoss:
    """The loss of every cluster on held-out samples, at levels and with noise that stay the same.

    So it shows what a model has learned without the noise of training's batches, and without what it knows by
    heart. The clusters have equal numbers of samples.

    Args:
        trainer: of the run.

    Raises:
        UserError: the data hold out no samples.
    """

    def __init__(self, trainer: Trainer) -> None:
        config, items = trainer.config, trainer.data.validation
        if items is None:
            raise UserError(
                "evaluation.validation_every: expected 0 for data that hold out no samples, found "
                f"{config.evaluation.validation_every}"
            )
        self._process, self._conditioning = trainer.process, trainer.conditioning
        self._half = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        self._device, self._k, count = (
            trainer.device,
            trainer.clusters.k,
            config.evaluation.validation_samples,
        )
        draws = torch.Generator().manual_seed(config.seed)
        self._levels, self._clusters = trainer.clusters.sample(count, generator=draws)
        with blame("data", (ValueError, RuntimeError)):
            self._batch = next(batches(items, EpochOrder(len(items), count, config.seed), augment=False))
            UnreadableSamples(config.unreadable).add(self._batch.unreadable)
        self._noise = torch.randn(self._batch.x.shape, generator=draws)
        self._parts = torch.arange(count).split(config.batch_size)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Tensor:
        """The losses [K] on the CPU of a model in evaluation mode."""
        losses = torch.cat([self._losses(model, part) for part in self._parts])
        return ops.cluster_mean(losses.cpu(), self._clusters, self._k)

    def _losses(self, model: nn.Module, part: Tensor) -> Tensor:
        given = self._batch.conditioning
        conditions = [given[i] for i in part.tolist()] if isinstance(given, list) else given
        if isinstance(conditions, Tensor):
            conditions = conditions[part].to(self._device)
        x, noise, level = (each[part].to(self._device) for each in (self._batch.x, self._noise, self._levels))
        noisy, told = self._process.inputs(self._process.noisy(x, noise, level), level)
        with torch.autocast(self._device.type, self._half, enabled=self._half is not None):
            output = prediction(denoise(model, noisy, told, self._conditioning.arguments(conditions)))
        return self._process.loss(output, x, noise, level)
