"""A trained denoiser: the averaged weights of a run, ready to draw and to be judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import UserError, blame
from .._extras import require
from .._files import replacing, write_json
from ..analysis import Judge
from ..data import Conditioning, EpochOrder, batches
from ..data.items import Conditions
from ..train import checkpoint
from ..train.components import (
    Data,
    build_conditioning,
    build_data,
    build_model,
    build_scheduler,
    resolve_device,
)
from ..train.config import NEIGHBOURS, Config, check
from ..train.folder import RunFolder
from ..train.loop import Trainer
from . import evaluation, plots, sampling
from .power_average import power_average
from .titles import method_title

PICTURES_PER_CLASS = 10
MOST_CLASSES_DRAWN = 20  # of data with more of them, classes evenly spread


@dataclass(frozen=True)
class TrainedDenoiser:
    """The averaged weights and what belongs to them.

    Attributes:
        config: of the run.
        data: the real images.
        scheduler: the noise schedule of training.
        model: the denoiser with its EMA weights.
        iteration: optimizer steps done.
        conditioning: passes conditions to the model.
    """

    config: Config
    data: Data
    scheduler: Any
    model: nn.Module
    iteration: int
    conditioning: Conditioning | None = None

    @property
    def title(self) -> str:
        """What the pictures say of the run."""
        return f"{method_title(self.config)}, {self.iteration:,} iterations"

    def draw(self, labels: Conditions, count: int, seed: int) -> Tensor:
        """Draw pictures, float32 [count, C, H, W] in [-1, 1]; of latents those that their autoencoder decodes.

        Latents without an autoencoder stay latents.
        """
        return sampling.draw(
            self.model,
            self.scheduler,
            self.config.sampling,
            (count, *self.data.shape),
            labels,
            seed,
            self.conditioning,
            sampling.build_decoder(self.data, self._device),
        )

    def evaluate(self, num_samples: int | None = None) -> dict[str, Any]:
        """The metrics of the run; the same for the same weights and seed.

        Args:
            num_samples: pictures to draw; as configured by default.

        Raises:
            UserError: too few, or the data have no labels, which the classifier needs that gives the features.
        """
        count = self._number_to_judge(num_samples)
        labels = sampling.balanced_labels(count, self.data.num_classes)
        pictures = self.draw(self.conditions(count) if labels is None else labels, count, self.config.seed)
        figures = self.judge().evaluate(pictures, labels, self.config.seed)
        about = {"method": self.config.method, "iterations": self.iteration, "num_samples": count}
        return {**figures, **about, "sampling_steps": self.config.sampling.steps, "seed": self.config.seed}

    def labels_to_judge(self, num_samples: int | None = None) -> Tensor:
        """Classes of the pictures to evaluate, int64 [num_samples], in equal numbers.

        Args:
            num_samples: as configured by default.

        Raises:
            UserError: too few, or the data have no labels.
        """
        labels = sampling.balanced_labels(self._number_to_judge(num_samples), self.data.num_classes)
        if labels is None:
            raise UserError("evaluation: expected data with labels, found none")
        return labels

    def judge(self) -> Judge:
        """What compares pictures with the real ones, in the features that the configuration names."""
        return evaluation.build_judge(self.data, self.config.evaluation, self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _number_to_judge(self, num_samples: int | None) -> int:
        count = self.config.evaluation.num_samples if num_samples is None else num_samples
        if count <= NEIGHBOURS:
            raise UserError(f"evaluation.num_samples: expected more than {NEIGHBOURS}, found {count}")
        return count

    def write_metrics(self, path: Path) -> dict[str, Any]:
        """Evaluate and write the metrics as JSON."""
        metrics = self.evaluate()
        write_json(path, metrics)
        return metrics

    def write_samples(self, path: Path) -> None:
        """Draw ten pictures per class, of 20 classes at most, into a picture file; 100 without classes."""
        drawn = min(self.data.num_classes, MOST_CLASSES_DRAWN)
        count = PICTURES_PER_CLASS * max(drawn, PICTURES_PER_CLASS)
        labels, pictures = self._drawn(count, drawn)
        with replacing(path) as aside:
            plots.samples(aside, pictures, labels, self.title)

    def draw_some(self, count: int) -> Tensor:
        """Draw pictures for a look, of as many classes as there are or will go in, the same ones every time."""
        return self._drawn(count, min(self.data.num_classes, count))[1]

    def _drawn(self, count: int, classes: int) -> tuple[Tensor | None, Tensor]:
        """Pictures of evenly spread classes, with those; without classes, of held-out conditions."""
        labels = sampling.balanced_labels(count, classes)
        if labels is not None:
            labels = labels * self.data.num_classes // classes
        wanted = self.conditions(count) if labels is None else labels
        return labels, self.draw(wanted, count, self.config.seed)

    def conditions(self, count: int) -> Conditions:
        """Captions or embeddings of held-out samples, over and over; None where there are none."""
        if not self.config.conditioning.enabled:
            return None
        items = self.data.validation or self.data.training
        order = EpochOrder(len(items), count, self.config.seed)
        return next(batches(items, order, augment=False)).conditioning

    def write_model(self, path: Path) -> None:
        """Write the weights as the model's own ``save_pretrained`` does, else as safetensors; of LoRA adapters."""
        with blame(f"{path}: cannot be written", (OSError,)), replacing(path) as aside:
            save_pretrained = getattr(self.model, "save_pretrained", None)
            if self.config.compute.lora:
                state = require("peft", "lora").get_peft_model_state_dict(self.model)
                self.model.peft_config["default"].save_pretrained(aside)  # type: ignore[union-attr, index]
                require("safetensors.torch", "train").save_file(state, aside / "adapter_model.safetensors")
            elif callable(save_pretrained):
                with blame("model: save_pretrained"):
                    save_pretrained(aside)
            else:
                aside.mkdir()
                checkpoint.save_module(aside / "model.safetensors", self.model)


def of_trainer(trainer: Trainer) -> TrainedDenoiser:
    """The averaged weights of a run that is under way."""
    return TrainedDenoiser(
        trainer.config,
        trainer.data,
        trainer.scheduler,
        trainer.ema.model,
        trainer.iteration,
        trainer.conditioning,
    )


def load(run: RunFolder, config: Config, chosen: Path | str | None = None) -> TrainedDenoiser:
    """Read the averaged weights of a run's newest checkpoint.

    Args:
        run: the run.
        config: its configuration; options that do not concern training may have been changed.
        chosen: another checkpoint.

    Raises:
        UserError: there is no intact checkpoint.
    """
    device = resolve_device(config.device)
    data = build_data(config)
    model = build_model(config, data, device)
    path = run.checkpoint(chosen)
    if path is None:
        raise UserError(f"run folder {run}: expected a checkpoint, found none yet")
    done = checkpoint.iteration(path)
    checkpoint.load_module(path, "ema", model)
    load_power_average(run, config, done, model)
    conditioning = build_conditioning(config, data, device)
    return TrainedDenoiser(config, data, build_scheduler(config), model.eval(), done, conditioning)


def load_run(
    run_dir: Path | str, checkpoint: Path | str | None, device: str, **sampling: Any
) -> TrainedDenoiser:
    """The averaged weights of a run, to be drawn from with options other than its own where they are not None."""
    run = RunFolder(run_dir)
    config = replace(run.read_config(), device=device)
    given = {name: value for name, value in sampling.items() if value is not None}
    config = check(replace(config, sampling=replace(config.sampling, **given)))
    return load(run, config, checkpoint)


def load_power_average(run: RunFolder, config: Config, iteration: int, model: nn.Module) -> None:
    """Put the power EMA of the configured width into a model; without one it stays as it is.

    Raises:
        UserError: the run has kept no snapshots.
    """
    if config.sampling.sigma_rel is None:
        return
    buffers = [name for name, _ in model.named_buffers()]
    with blame("sampling"):
        found = power_average(
            run.snapshots(), config.sigma_rels, iteration, config.sampling.sigma_rel, buffers
        )
        model.load_state_dict(found, strict=False)
