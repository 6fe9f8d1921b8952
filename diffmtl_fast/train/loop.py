"""The training loop: one ordinary loop in which ClusteredMTL takes the place of ``loss.mean().backward()``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._progress import Progress
from .._torch import foreach_div_
from ..curriculum import DifficultyCurriculum
from ..data import Batch, EpochOrder, batches
from ..gradients import ClusteredMTL
from ..weighting import ContinuousUncertainty, GramianWeighting, LossWeighting, param_groups
from . import checkpoint, processes
from .components import (
    build_clusters,
    build_conditioning,
    build_data,
    build_model,
    build_schedule,
    build_scheduler,
    build_timesteps,
    build_weighting,
    denoise,
    prediction,
    refuse_classes,
    refuse_output,
    resolve_device,
)
from .config import Config, changed, to_dict
from .ema import Ema
from .errors import Interrupted, TrainingDiverged, UserError, blame
from .history import History, describe
from .noise import Noise


class Trainer:
    """Everything that training changes, and the step that changes it.

    Args:
        config: the configuration. Its components are built here, so that a bad one is refused before anything
            is written.

    Attributes:
        iteration: optimizer steps done.
        seconds: time that they took.
        stop: set it to what asks for it, and training stops after the present iteration, with a checkpoint.

    Raises:
        UserError: a part of the configuration cannot be used.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.data = build_data(config)
        with blame("data"):
            self._fingerprint = self.data.fingerprint()
        self.scheduler = build_scheduler(config)
        self.noise = Noise(config, self.scheduler, self.device)
        self.process = self.noise.process
        number, log_snr = self.noise.num_timesteps, self.noise.cluster_log_snr
        self.clusters = build_clusters(config.clusters, log_snr, number, distribution=self.noise.distribution)
        self.timesteps = build_timesteps(config, self.clusters, log_snr, number)
        self.model = build_model(config, self.data, self.device, self.noise.last_time)
        with blame("model: cannot be copied"):
            self.ema = Ema(self.model, config.ema_decay)
        self._run: torch.nn.Module = self.model
        if config.compute.compile:
            self._run = torch.compile(self.model)  # type: ignore[assignment]
        if processes.world() > 1 and not config.balanced:
            self._run = torch.nn.parallel.DistributedDataParallel(self._run)
        self.weighting = build_weighting(config, self.clusters.k, self.device)
        self.mtl = None
        if isinstance(self.weighting, LossWeighting | GramianWeighting):
            options, dtype = config.compute, config.compute.jacobian_dtype
            with blame("compute"):
                self.mtl = ClusteredMTL(
                    self._run,
                    num_clusters=self.clusters.k,
                    weighting=self.weighting,
                    engine=options.engine,
                    memory=options.memory,
                    jacobian_dtype=None if dtype is None else getattr(torch, dtype),
                    drop_nonfinite=config.loss.nonfinite == "drop",
                )
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, self.weighting or torch.nn.Module()),
            lr=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.schedule = build_schedule(config, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        # Fresh dropout masks and the like come from torch's own generators: build_model seeded them.
        own_seed = (
            config.seed + 1_000_003 * processes.rank()
        )  # every process draws noise and levels of its own
        self.generator = torch.Generator(self.device).manual_seed(own_seed)
        # Timesteps are drawn on the host, so that a step does not wait for a GPU to know its clusters.
        self._one_generator = self.device.type == "cpu"
        own = self.generator if self._one_generator else torch.Generator().manual_seed(own_seed)
        self.host_generator = own
        self.conditioning = build_conditioning(config, self.data, self.device)
        self.unreadable: set[str] = set()
        self._batches: Iterator[Batch] | None = None
        self.iteration = 0
        self.seconds = 0.0
        self.stop: str | None = None

    def fit(self, folder: Path, history: History, progress: Progress) -> None:
        """Train up to the configured iteration.

        Args:
            folder: where checkpoints go. The last one is that of the last iteration.
            history: receives the figures of every step.
            progress: receives every iteration.

        Raises:
            TrainingDiverged: a loss or a weight is not finite; the checkpoints before it stay.
            Interrupted: `stop` was set.
        """
        with blame("model"):
            self.model.train()
        begun = time.perf_counter() - self.seconds
        total = self.config.iterations
        while self.iteration < total:
            self.step(history)
            self.seconds = time.perf_counter() - begun
            line = None
            if self.iteration % self.config.logging.every == 0 or self.iteration == total:
                line = history.flush(self.iteration, **self._phase(), seconds=round(self.seconds, 3))
            progress.update(self.iteration, None if line is None else describe(line))
            if self.iteration % self.config.checkpoints.every == 0 or self.iteration == total or self.stop:
                self.save(folder, history)
            if self.stop and self.iteration < total:
                raise Interrupted(f"{self.stop} at iteration {self.iteration}; --resume continues from there")

    def step(self, history: History) -> None:
        """One optimizer step."""
        every = self.config.logging.cosines_every
        if self.mtl is not None:
            self.mtl.measure_gramian = every > 0 and self.iteration % every == 0
        self.optimizer.zero_grad(set_to_none=True)
        with blame("training"):
            drawn = [self._backward(history) for _ in range(self.config.accumulate)]
        norm = self._finish_gradients()
        if norm is not None:
            history.add_gradient_norm(norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.schedule is not None:
            self.schedule.step()
        self.ema.update(self.model)
        losses, timesteps = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        losses, timesteps = processes.gathered(losses), processes.gathered(timesteps)
        if self.config.loss.nonfinite == "drop":
            counted = losses.isfinite()
            losses, timesteps = losses[counted], timesteps[counted]
        if len(losses):
            self.timesteps.update(losses, timesteps)
        self.iteration += 1

    def save(self, folder: Path, history: History) -> Path:
        """Write a checkpoint, unless training has diverged.

        Raises:
            TrainingDiverged: a loss or a weight is not finite.
        """
        history.check(self.iteration)
        if processes.rank() > 0:
            return folder
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingDiverged(f"the weights {name} are not finite at iteration {self.iteration}")
        return checkpoint.save(
            folder,
            self.iteration,
            {"model": self.model, "ema": self.ema.model},
            {
                "iteration": self.iteration,
                "config": to_dict(self.config),
                "data": self._fingerprint,
                "seconds": self.seconds,
                "device": self.device.type,
                "clusters": self.clusters.to_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "weighting": None if self.weighting is None else self.weighting.state_dict(),
                "ema_updates": self.ema.updates,
                "unreadable": sorted(self.unreadable),
                "timesteps": self.timesteps.state_dict(),
                "history": history.state_dict(),
                "generator": self.generator.get_state(),
                "host_generator": None if self._one_generator else self.host_generator.get_state(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            self.config.checkpoints.keep,
        )

    def load(self, path: Path, history: History) -> None:
        """Continue from a verified checkpoint.

        Raises:
            UserError: it was written on another type of device, whose random numbers cannot be continued here, or
                with other clusters.
        """
        state = checkpoint.load_state(path)
        with blame(f"checkpoint {path}: {checkpoint.STATE} does not fit"):
            self._refuse_other_run(path, state)
        checkpoint.load_module(path, "model", self.model)
        checkpoint.load_module(path, "ema", self.ema.model)
        with blame(f"checkpoint {path}: {checkpoint.STATE} does not fit"):
            self._load_state(state, history)

    def _refuse_other_run(self, path: Path, state: dict[str, Any]) -> None:
        if state["device"] != self.device.type:
            raise UserError(
                f"device: expected {state['device']}, on which {path} was written, found {self.device.type}"
            )
        other = changed(self.config, state.get("config", {}))
        if other is not None:
            key, then, now = other
            raise UserError(f"{key}: expected {then!r}, with which {path} was written, found {now!r}")
        data = self._fingerprint
        if state.get("data", data) != data:
            raise UserError(f"data: expected those of {path}, {state['data']}, found {data}")
        saved = type(self.clusters).from_dict(state["clusters"])
        if saved.probabilities.tolist() != self.clusters.probabilities.tolist():  # of another affinity, say
            raise UserError(f"clusters: expected those of {path}, {saved}, found {self.clusters}")

    def _load_state(self, state: dict[str, Any], history: History) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for part, name in ((self.schedule, "schedule"), (self.scaler, "scaler")):
            if part is not None:
                part.load_state_dict(state[name])
        if self.weighting is not None:
            self.weighting.load_state_dict(state["weighting"])
        self.ema.updates = state["ema_updates"]
        if processes.rank() > 0:  # the saved ones are the first process's
            for generator in (self.generator, self.host_generator):
                generator.manual_seed(generator.initial_seed() + state["iteration"])
        else:
            self.generator.set_state(state["generator"])
        if processes.rank() == 0 and not self._one_generator:
            self.host_generator.set_state(state["host_generator"])
        self.unreadable, self._batches = set(state["unreadable"]), None
        with blame("curriculum"):
            self.timesteps.load_state_dict(state["timesteps"])
        if processes.rank() == 0:
            history.load_state_dict(state["history"], self.device)
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.iteration, self.seconds = state["iteration"], state["seconds"]

    def _backward(self, history: History) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch; gradients are added to ``.grad``.

        Returns:
            Losses and timesteps [B] of the samples.
        """
        batch = self._next_batch()
        images, arguments = batch.x, self.conditioning.arguments(batch.conditioning, self._dropped())
        t, cluster = self.timesteps.sample(len(images), device=self.device, generator=self.host_generator)
        noise = torch.randn(images.shape, generator=self.generator, device=self.device)
        noisy, told = self.process.inputs(self.process.noisy(images, noise, t), t)
        half = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, half, enabled=self.config.precision != "fp32"):
            if self.mtl is None:
                with blame("model"):
                    output = denoise(self._run, noisy, told, arguments)
            else:
                with blame("model"):  # it may be one that cannot be split by cluster
                    output = denoise(self.mtl, noisy, told, arguments, cluster=cluster)
        predicted = prediction(output)
        refuse_output(predicted, images)
        loss = self.process.loss(predicted, images, noise, t)
        weight = self.timesteps.weight(t)
        if isinstance(self.weighting, ContinuousUncertainty):
            levels = self.process.log_snr(t)
            self._scaled((self.weighting.per_sample(loss, levels) * weight).mean()).backward()
            self._record_plain(history, loss.detach(), weight, t, self.weighting.log_var(levels).detach())
        elif self.mtl is None:
            self._scaled((loss * weight).mean()).backward()
            self._record_plain(history, loss.detach(), weight, t)
        else:
            self.mtl.backward(loss * weight, scaler=self.scaler)
            last = self.mtl.last
            assert last is not None  # set by backward
            history.add(last.losses, last.present, last.weights, last.gramian, last.dropped)
        return loss.detach(), t

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _next_batch(self) -> Batch:
        """The next batch of the order that the seed gives, on the device.

        Raises:
            UserError: more samples than allowed cannot be read.
        """
        config = self.config
        if self._batches is None:
            items, seen = self.data.training, self.iteration * config.accumulate
            place = processes.rank(), processes.world()
            order = EpochOrder(len(items), config.batch_size, config.seed, seen, *place)
            self._batches = batches(items, order, workers=config.workers, pin=self.device.type == "cuda")
        with blame("data"):
            batch = next(self._batches)
            refuse_classes(batch, self.data)
        for name, reason in batch.unreadable.items():
            if name not in self.unreadable:
                logging.getLogger("diffmtl_fast").warning(
                    "left out %s, which cannot be read: %s", name, reason
                )
            self.unreadable.add(name)
            if len(self.unreadable) > config.unreadable:
                raise UserError(
                    f"unreadable: expected at most {config.unreadable} files that cannot be read, found one more: "
                    f"{name} ({reason})"
                )
        return batch.to(self.device)

    def _dropped(self) -> Tensor | None:
        """Which samples lose their condition, bool [B]; None for none."""
        share, count = self.config.conditioning.dropout, self.config.batch_size
        if share == 0:
            return None
        return torch.rand(count, generator=self.generator, device=self.device) < share

    def _record_plain(
        self, history: History, loss: Tensor, weight: Tensor, t: Tensor, log_var: Tensor | None = None
    ) -> None:
        """The cluster losses of training without clusters, each the weighted mean over the cluster.

        So are the weights e^{−u} where there are log-variances u.
        """
        cluster, k = self.clusters.assign(t), self.clusters.k
        total = ops.cluster_mean(weight, cluster, k)
        losses = ops.cluster_mean(loss * weight, cluster, k) / total
        weights = (
            None if log_var is None else ops.cluster_mean(torch.exp(-log_var) * weight, cluster, k) / total
        )
        present = torch.zeros(k, dtype=torch.bool, device=self.device).index_fill(0, cluster, True)
        history.add(losses, present, weights)

    def _phase(self) -> dict[str, int]:
        """The phase of the next iteration, for the log; empty without a curriculum."""
        return {"phase": self.timesteps.phase} if isinstance(self.timesteps, DifficultyCurriculum) else {}

    def _finish_gradients(self) -> Tensor | None:
        """Average over the accumulated batches, then clip; the norm before, if it was needed."""
        if self.config.accumulate > 1:
            for group in self.optimizer.param_groups:
                grads = [p.grad for p in group["params"] if p.grad is not None]
                foreach_div_(grads, self.config.accumulate)
        if self.config.clip == 0:
            return None
        last = None if self.mtl is None else self.mtl.last
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        elif last is not None and last.grad_norm is not None:  # the step has measured it
            norm = last.grad_norm / self.config.accumulate
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
            return norm
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
