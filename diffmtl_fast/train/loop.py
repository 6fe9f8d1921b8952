"""The training loop: one ordinary loop in which ClusteredMTL takes the place of ``loss.mean().backward()``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._errors import Interrupted, TrainingDiverged, UserError, blame
from .._files import replacing
from .._host import pins
from .._progress import Progress
from .._torch import foreach_div_
from ..clustering.drawing import hand_over
from ..curriculum import DifficultyCurriculum
from ..data import Batch, EpochOrder, UnreadableSamples, batches
from ..data.items import refuse_classes
from ..distributed import launched
from ..distributed.fully_sharded import local
from ..gradients import ClusteredMTL
from ..weighting import ContinuousUncertainty, GramianWeighting, LossWeighting, param_groups
from . import checkpoint
from .components import (
    build_clusters,
    build_conditioning,
    build_data,
    build_model,
    build_noise,
    build_schedule,
    build_scheduler,
    build_timesteps,
    build_weighting,
    denoise,
    prediction,
    refuse_output,
    resolve_device,
)
from .config import Config, changed, to_dict
from .ema import POWER_EMA, Ema, PowerEma
from .history import History, describe


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
        self.noise = build_noise(config, self.scheduler, self.device)
        self.process = self.noise.process
        number, log_snr = self.noise.num_timesteps, self.noise.cluster_log_snr
        self.clusters = build_clusters(config.clusters, log_snr, number, distribution=self.noise.distribution)
        self.timesteps = build_timesteps(config, self.clusters, log_snr, number)
        self.model = build_model(config, self.data, self.device, self.noise.last_time)
        with blame("model: cannot be copied"):
            self.ema = Ema(self.model, config.ema_decay)
            self.power_ema = PowerEma(self.model, config.sigma_rels)
        self._in_shards = config.compute.sharding != "none"
        self.sharded = self._in_shards and launched.world() > 1
        if self.sharded:
            for model in (self.model, self.ema.model):
                launched.shard(model, self.device)
        self._run: torch.nn.Module = self.model
        if config.compute.compile:
            self._run = torch.compile(self.model)  # type: ignore[assignment]
        if launched.world() > 1 and not config.balanced and not self.sharded:
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
            fused=True,
        )
        self.schedule = build_schedule(config, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        # Fresh dropout masks and the like come from torch's own generators: build_model seeded them.
        # Every process draws noise and levels of its own.
        own_seed = config.seed + 1_000_003 * launched.rank()
        self.generator = torch.Generator(self.device).manual_seed(own_seed)
        # Timesteps are drawn on the host, so that a step does not wait for a GPU to know its clusters.
        self._one_generator = self.device.type == "cpu"
        own = self.generator if self._one_generator else torch.Generator().manual_seed(own_seed)
        self.host_generator = own
        self.conditioning = build_conditioning(config, self.data, self.device)
        self.unreadable = UnreadableSamples(config.unreadable)
        self._batches: Iterator[Batch] | None = None
        self._weighs_step = config.weigh_per == "step"
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
            if launched.largest(int(self.stop is not None)):  # a signal to one process stops all of them here
                self.stop = self.stop or "stopped with another process"
            if self.iteration % self.config.checkpoints.every == 0 or self.iteration == total or self.stop:
                self.save(folder, history)
            if self.stop or self.iteration == total:
                self._batches = None  # ends the workers
            if self.stop and self.iteration < total:
                raise Interrupted(f"{self.stop} at iteration {self.iteration}; --resume continues from there")

    def step(self, history: History) -> None:
        """One optimizer step."""
        every = self.config.logging.cosines_every
        if self.mtl is not None:
            self.mtl.measure_gramian = every > 0 and self.iteration % every == 0
        self.optimizer.zero_grad(set_to_none=True)
        with blame("training"):
            drawn = self._accumulate(history)
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
        self.power_ema.update(self.model)
        losses, timesteps = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        losses, timesteps = launched.gathered(losses), launched.gathered(timesteps)
        if self.config.loss.nonfinite == "drop" and isinstance(self.timesteps, DifficultyCurriculum):
            finite = losses.isfinite()  # other samplers leave out what is not by themselves
            losses = torch.where(finite, losses, 0).sum() / finite.sum()
        self.timesteps.update(losses, timesteps)
        self.iteration += 1

    def save(self, folder: Path, history: History) -> Path:
        """Write a checkpoint, unless training has diverged; all processes call it.

        Returns:
            Where it is; the folder, in all processes but the first.

        Raises:
            TrainingDiverged: a loss or a weight is not finite.
        """
        history.check(self.iteration)
        bad = [name for name, p in self.model.named_parameters() if not local(p).isfinite().all()]
        if launched.largest(len(bad)):
            name = bad[0] if bad else "of another process"
            raise TrainingDiverged(f"the weights {name} are not finite at iteration {self.iteration}")
        shards = self._shards() if self._in_shards else None
        written = folder
        if launched.rank() == 0:
            written = self._write(folder, history, shards)
        elif shards is not None:
            checkpoint.save_shards(None, shards)
        launched.barrier()
        return written

    def _write(self, folder: Path, history: History, shards: dict[str, Any] | None) -> Path:
        if self.config.sigma_rels:
            (folder / POWER_EMA).mkdir(exist_ok=True)
            with replacing(folder / POWER_EMA / f"iter-{self.iteration:08d}.safetensors") as aside:
                checkpoint.save_module(aside, self.power_ema.models)
        return checkpoint.save(
            folder,
            self.iteration,
            {"model": self.model, "ema": self.ema.model} if shards is None else {},
            {
                "iteration": self.iteration,
                "config": to_dict(self.config),
                "data": self._fingerprint,
                "seconds": self.seconds,
                "device": self.device.type,
                "clusters": self.clusters.to_dict(),
                **{name: part.state_dict() for name, part in self._stateful().items()},
                "ema_updates": self.ema.updates,
                "unreadable": sorted(self.unreadable.names),
                "history": history.state_dict(),
                "generator": self.generator.get_state(),
                "host_generator": None if self._one_generator else self.host_generator.get_state(),
                "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            self.config.checkpoints.keep,
            shards,
        )

    def _stateful(self) -> dict[str, Any]:
        """What has a state of its own, by name in ``state.pt``; the sharded optimizer's is in the shards."""
        parts = {
            "optimizer": None if self._in_shards else self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
            "weighting": self.weighting,
            "timesteps": self.timesteps,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _shards(self) -> dict[str, Any]:
        """What is sharded, as state dicts by name; those of the optimizer by the names of its parameters."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": checkpoint.optimizer_shards(self._optimized, self.optimizer),
        }

    @property
    def _optimized(self) -> torch.nn.Module:
        weighting = self.weighting or torch.nn.Module()
        return torch.nn.ModuleDict({"model": self.model, "weighting": weighting})

    def load(self, path: Path, history: History) -> None:
        """Continue from a verified checkpoint.

        Raises:
            UserError: it was written on another type of device, whose random numbers cannot be continued here, or
                with other clusters.
        """
        state = checkpoint.load_state(path)
        with blame(f"checkpoint {path}: {checkpoint.STATE} does not fit"):
            self._refuse_other_run(path, state)
        if self._in_shards:
            shards = self._shards()
            checkpoint.load_shards(path, shards)
            checkpoint.load_optimizer_shards(self._optimized, self.optimizer, shards["optimizer"])
        else:
            checkpoint.load_module(path, "model", self.model)
            checkpoint.load_module(path, "ema", self.ema.model)
        if self.config.sigma_rels:
            checkpoint.load_module(path.parent / POWER_EMA, path.name, self.power_ema.models)
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
        for name, part in self._stateful().items():
            saved = state[name]
            with blame("curriculum") if name == "timesteps" else contextlib.nullcontext():
                part.load_state_dict(saved)
        self.ema.updates, self.power_ema.updates = state["ema_updates"], state["iteration"]
        if launched.rank() > 0:  # the saved ones are the first process's
            for generator in (self.generator, self.host_generator):
                generator.manual_seed(generator.initial_seed() + state["iteration"])
        else:
            self.generator.set_state(state["generator"])
            if not self._one_generator:
                self.host_generator.set_state(state["host_generator"])
            history.load_state_dict(state["history"], self.device)
        self.unreadable.names, self._batches = set(state["unreadable"]), None
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.iteration, self.seconds = state["iteration"], state["seconds"]

    def _accumulate(self, history: History) -> list[tuple[Tensor, Tensor]]:
        """Forward and backward of the batches of a step; losses and timesteps [B] of each."""
        number, found = self.config.accumulate, []
        for index, (t, cluster) in enumerate(self._levels()):
            last = index == number - 1
            with contextlib.nullcontext() if last else self._before_the_last():
                found.append(self._backward(history, t, cluster, recorded=last or not self._weighs_step))
        return found

    def _levels(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Noise levels and clusters [B] of the step's batches; drawn at once if they are weighed as one."""
        size, number, draw = self.config.batch_size, self.config.accumulate, self.timesteps.sample
        if not self._weighs_step:
            for _ in range(number):
                yield draw(size, device=self.device, generator=self.host_generator)
            return
        where = self.device if self.timesteps.follows_losses else torch.device("cpu")
        t, cluster = draw(size * number, device=where, generator=self.host_generator)
        for part in zip(t.split(size), cluster.split(size), strict=True):
            yield hand_over(*part, self.device)

    def _before_the_last(self) -> contextlib.AbstractContextManager[None]:
        """What a batch that is not the step's last is run within."""
        if self.mtl is not None and self._weighs_step:
            return self.mtl.no_sync()
        if isinstance(self._run, torch.nn.parallel.DistributedDataParallel):
            return self._run.no_sync()
        return contextlib.nullcontext()

    def _backward(
        self, history: History, t: Tensor, cluster: Tensor, *, recorded: bool
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch; gradients are added to ``.grad``.

        Args:
            history: receives the figures.
            t: noise levels [B].
            cluster: clusters [B].
            recorded: of a step's batches that are weighed as one, only the last has figures.

        Returns:
            Losses and timesteps [B] of the samples.
        """
        batch = self._next_batch()
        images, arguments = batch.x, self.conditioning.arguments(batch.conditioning, self._dropped())
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
            if recorded and last is not None:
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
            place = launched.rank(), launched.world()
            order = EpochOrder(len(items), config.batch_size, config.seed, seen, *place)
            self._batches = batches(items, order, workers=config.workers, pin=pins(self.device))
        with blame("data"):
            batch = next(self._batches)
            refuse_classes(batch, self.data.num_classes)
        with blame("unreadable"):
            self.unreadable.add(batch.unreadable)
        return batch.to(self.device)

    def _dropped(self) -> Tensor | None:
        """Which samples lose their condition, bool [B] on the host; None for none."""
        share, count = self.config.conditioning.dropout, self.config.batch_size
        if share == 0:
            return None
        return torch.rand(count, generator=self.host_generator) < share

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
        """Average over batches that were weighed by themselves, then clip; the norm before, if it was needed."""
        number = 1 if self._weighs_step and self.mtl is not None else self.config.accumulate
        if number > 1:
            for group in self.optimizer.param_groups:
                grads = [local(p.grad) for p in group["params"] if p.grad is not None]
                foreach_div_(grads, number)
        if self.config.clip == 0:
            return None
        last = None if self.mtl is None else self.mtl.last
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        elif last is not None and last.grad_norm is not None:  # the step has measured it
            norm = last.grad_norm / number
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
            return norm
        found: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        return found.full_tensor() if hasattr(found, "full_tensor") else found
