"""`ClusteredMTL`: the wrapper that turns a plain training step into a multi-task one."""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .._host import upload
from .._torch import fully_sharded_modules, sparse_values
from ..distributed import (
    Alone,
    Arrivals,
    GroupReference,
    PlainArrivals,
    Ranks,
    Replicas,
    ShardedJacobian,
    find_group,
    refuse_outer_wrapper,
    settle,
)
from ..weighting import GramianWeighting, LossWeighting
from . import diagnostics
from .accumulation import Accumulation, tally
from .batch import BatchLayout, check_cluster
from .engine import Engine, EngineName, Memory
from .fully_sharded import FullyShardedEngine
from .loss_check import refuse_scaled
from .measuring import Repeat, gramian_one_by_one
from .model_state import ModelState
from .parameters import grads_set_aside, refuse_hooks
from .plain_pass import collect_plain
from .step import Step
from .stores import Jacobian, Rows
from .uncompiled import uncompiled

_logger = logging.getLogger("diffmtl_fast")
# Binary orders of magnitude from 1 in which a Gramian is left as it is; float32 has 126.
_ROOM = 60
_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class StepRecord:
    """What the last `ClusteredMTL.backward` saw, for logging. Tensors stay on the device; nothing is averaged.

    Attributes:
        losses: [K], the mean loss of each cluster; 0 for an absent one.
        weights: w, [K], in the convention d = (1/n) Σ_k w_k g_k over the n present clusters; 0 for an absent one.
        present: bool [K], the clusters with samples in the batch that were not dropped.
        gramian: G = J Jᵀ, float64 [K, K], right for losses from 1e-30 to 1e30; None where the step formed no
            per-cluster gradients.
        grad_norm: the norm of all ``.grad`` of the model's trainable parameters, those included that earlier
            backwards left there, measured while it was written: the norm that `torch.nn.utils.clip_grad_norm_`
            would find. Pass it to `torch.nn.utils.clip_grads_with_norm_` to clip without another pass. Scaled as
            ``.grad`` is where there is a GradScaler. None where the step formed no per-cluster gradients, and with
            memory="lean".
        dropped: bool [K], the clusters that ``drop_nonfinite`` left out of the step; None without it.
    """

    losses: Tensor
    weights: Tensor
    present: Tensor
    gramian: Tensor | None
    grad_norm: Tensor | None = None
    dropped: Tensor | None = None

    @property
    def cosines(self) -> Tensor | None:
        """Cosines of the angles between the cluster gradients, [K, K]; NaN for clusters without a gradient."""
        return None if self.gramian is None else diagnostics.cosines(self.gramian)

    @property
    def conflicts(self) -> Tensor | None:
        """Share of the pairs of clusters whose gradients have a negative cosine, a scalar; NaN without a pair."""
        return None if self.cosines is None else diagnostics.conflicts(self.cosines)


class ClusteredMTL(nn.Module):
    """Train a diffusion model with one task per timestep cluster, at about the price of a plain step.

    Wraps a model like `DistributedDataParallel` does: call it with the model's own arguments plus `cluster`, and
    replace ``loss.mean().backward()`` by ``mtl.backward(loss)``, which fills the parameters' ``.grad``.

    Where the weighting needs only losses (or `NashMTL` is between refreshes), the step is the plain step. Where it
    needs the Gramian of the cluster gradients, one forward and one backward yield all of them, exact as long as
    each sample's loss depends on that sample alone; models in which samples mix are refused. An output or an
    argument is taken to hold one row per sample if its dimension 0 has the size of the batch.

    Any other backward through the output (``loss.backward()``) behaves as if the model were not wrapped. So does
    `torch.autograd.grad`, but in slices it finds no way from the output to the parameters.

    Args:
        model: any module; its parameters are trained through their ``.grad`` as usual.
        num_clusters: K.
        weighting: a `LossWeighting` or a `GramianWeighting`.
        engine: "grouped" runs the batch as a whole and forms only the parameters' gradients cluster by cluster,
            by the rules of `register_cluster_rule`, and modules without a rule in slices; "sliced" runs the whole
            model once per cluster slice. "auto" is grouped wherever a check finds it exact, and sliced for
            compiled models and where the check fails; it logs what it chose and why.
        memory: "full" keeps the Jacobian, K times the parameters' memory. "lean" keeps, for every operation, the
            smaller of its block of it and of what forms its part of the update once the weights are known; that
            takes the place of activations that the backward frees. Under activation checkpointing or offloading it
            keeps neither, and takes a second backward.
        jacobian_dtype: dtype of the stored per-cluster gradients, such as `torch.bfloat16` to halve their memory;
            the Gramian is accumulated in float32 all the same. Default: each parameter's own.
        shared: names of keyword arguments, or positions of positional ones, that belong to the whole batch
            although their first dimension happens to equal its size.
        drop_nonfinite: leave a cluster whose loss or gradient is not finite out of the step, as if it were absent
            from the batch; every step forms the cluster gradients for it. With a GradScaler, which wants to see
            overflowed gradients, the loss alone decides. By default such a cluster makes NaN of every ``.grad``.
        process_group: the processes that train replicas of the model together, or one that `fully_shard` has
            sharded over them, each on samples of its own; their steps are the step of one process with all of the
            samples. Default: the world, where torch.distributed is initialised; a model in
            `DistributedDataParallel` is taken out of it, and its group taken over.
        compile: compile the model in place, by `torch.nn.Module.compile` with these arguments (``mode``,
            ``dynamic``, ``backend``, ...), or with none. The same as to compile it before it is wrapped.

    Attributes:
        module: the model.
        weighting: the weighting. `state_dict` is the model's alone, under the model's own names; save
            ``mtl.weighting.state_dict()`` beside it.
        last: the `StepRecord` of the last `backward`; None before the first.
        measure_gramian: set it to form the Gramian in the next steps, for logging, although the weighting does
            not need it. The update stays what it is without, bit by bit in one process.

    Raises:
        TypeError: an argument has the wrong type, or the model is in `DataParallel`.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        num_clusters: int,
        weighting: LossWeighting | GramianWeighting,
        *,
        engine: EngineName = "auto",
        memory: Memory = "full",
        jacobian_dtype: torch.dtype | None = None,
        shared: Collection[str | int] = (),
        drop_nonfinite: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        super().__init__()
        model, process_group = _bare(model, process_group)
        if not isinstance(weighting, LossWeighting | GramianWeighting):
            raise TypeError(
                f"weighting: expected a LossWeighting or a GramianWeighting, found {type(weighting).__name__}"
            )
        if num_clusters < 1:
            raise ValueError(f"num_clusters: expected at least 1, found {num_clusters}")
        if memory not in get_args(Memory):
            raise ValueError(f"memory: expected 'full' or 'lean', found {memory!r}")
        if memory == "lean" and engine == "sliced":
            raise ValueError("memory='lean': expected engine 'auto' or 'grouped', found 'sliced'")
        if memory == "lean" and drop_nonfinite:
            raise ValueError(
                "drop_nonfinite: expected memory='full', whose Jacobian holds the clusters apart, found 'lean'"
            )
        if jacobian_dtype is not None and not jacobian_dtype.is_floating_point:
            raise ValueError(f"jacobian_dtype: expected a floating-point dtype, found {jacobian_dtype}")
        if compile:
            model.compile(**(compile if isinstance(compile, Mapping) else {}))
        self.module = model
        self.weighting = weighting
        self.num_clusters = num_clusters
        self.memory = memory
        self.drop_nonfinite = drop_nonfinite
        self.measure_gramian = False
        self.last: StepRecord | None = None
        self._process_group = None if process_group is None else GroupReference(process_group)
        self._replicas = Alone()
        self._engine: Engine | FullyShardedEngine = Engine(
            model, num_clusters, engine, memory, shared, jacobian_dtype
        )
        if fully_sharded_modules(model):
            _refuse_with_shards(engine, memory)
            self._engine = FullyShardedEngine(model, num_clusters, shared, jacobian_dtype)
        self._plain_arrivals = PlainArrivals()
        self._accumulation: Accumulation | None = None
        self._syncing = True
        self._step: Step | None = None  # that waits for its backward
        self._calls = threading.RLock()  # held by the thread whose call runs

    def forward(self, *args: Any, cluster: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            *args: the model's positional arguments.
            cluster: int64 [B], the cluster of each sample, 0..K-1 in any order (sorted is fastest). Without it,
                or where gradients are disabled, this is a plain call of the model. On an accelerator, reading it
                is the step's one host synchronisation; it is not read as it comes from a sampler that drew it on
                the host, or from the CPU.
            **kwargs: the model's keyword arguments.

        Returns:
            What the model returns.

        Raises:
            TypeError, ValueError: `cluster` is not as stated, or the model can't be split (see the class).
            RuntimeError: the last output was differentiated by something other than `backward`, or the model can't
                be run by the engine that was asked for.
        """
        if torch.compiler.is_compiling():
            reason = "ClusteredMTL is not compiled; compile the model instead"
            return uncompiled(_forward_with_a_warning, reason)(self, cluster, args, kwargs)
        return self._forward(cluster, args, kwargs)

    def _forward(self, cluster: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if cluster is None or not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        if self.last is None:
            self._tell_unsaved_state()
        self._meet_other_processes()
        telling = self._replicas.telling_before_losses() if self._syncing else nullcontext()
        with self._one_thread(), telling:
            return self._forward_by_cluster(cluster, args, kwargs)

    def _forward_by_cluster(self, cluster: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_cluster(cluster, self.num_clusters)
        self._refuse_other_threads()
        self._refuse_lost_gradients()
        measured = self._measures_beside()
        needed = measured or self._needs_gradients_by_cluster()
        layout = BatchLayout(cluster, self.num_clusters) if needed else None
        step = self._continue_or_begin(layout, measured)
        self._engine.meet(cluster, step.by_cluster, args, kwargs)
        self._step = None  # a forward that fails leaves no step to finish
        if layout is not None and step.only is None:
            refuse_hooks(self.module, self._engine.parameters)
        if layout is not None and step.measured:
            repeat = Repeat(self.module, layout, args, kwargs)
            output = step.watch(self.module(*args, **kwargs))
            done = step.begin_pass(layout.clusters)
            done.repeat, done.outputs = repeat, repeat.note(output)
        elif step.by_cluster and layout is not None:
            output = self._engine.forward(step, layout, args, kwargs)
        else:
            output = step.watch(self.module(*args, **kwargs))
        step.cluster = cluster
        if step.passes:
            step.passes[-1].cluster = cluster
        self._step = step
        return output

    def _tell_unsaved_state(self) -> None:
        """Warn where `Accelerator.prepare` was given the wrapper: the accelerator saves its `state_dict` alone."""
        if self.__dict__.pop("_is_accelerate_prepared", False) and self.weighting.state_dict():
            _logger.warning(
                "ClusteredMTL: accelerator.prepare(mtl) lets save_state keep the model alone, without the state "
                "of %s; call diffmtl_fast.adapters.accelerate.prepare(accelerator, mtl) in its place, or "
                "accelerator.register_for_checkpointing(mtl.weighting) as well",
                type(self.weighting).__name__,
            )

    def _continue_or_begin(self, layout: BatchLayout | None, measured: bool) -> Step:
        """Return the step of this forward: that of the last one, if they can share a backward."""
        only = None
        if layout is not None and not measured:
            only = self._replicas.only_cluster(layout.clusters.sizes(layout.batch_size))
        by_cluster, changed = layout is not None and only is None and not measured, False
        if measured:
            changed = self._engine.begin(self.module)
        if by_cluster:
            if isinstance(self._engine, FullyShardedEngine) and self.accumulates:
                raise ValueError(
                    "no_sync(): expected a model that is not sharded, found one in fully_shard, whose processes "
                    "meet in every backward; leave it out, and every backward weighs its own batch"
                )
            if self.memory == "lean" and self.accumulates:
                raise ValueError("memory='lean': expected no no_sync(), found it; use memory='full'")
            if self.memory == "lean" and isinstance(self._replicas, Replicas):
                raise ValueError(
                    "memory='lean': expected one process, or samples of one cluster in each, found several "
                    "processes and clusters; draw samples with clusters.sample(..., rank=, world_size=), or use "
                    "memory='full', with jacobian_dtype=torch.bfloat16 to halve it"
                )
            changed = self._engine.begin(self.module)
        kind = (by_cluster, only, measured)
        before = self._step
        if before is None or changed or (before.by_cluster, before.only, before.measured) != kind:
            return Step(*kind)
        return before

    def _meet_other_processes(self) -> None:
        """Find the processes that train together; at their first step they settle that they do the same."""
        refuse_outer_wrapper(self)
        fully_sharded = isinstance(self._engine, FullyShardedEngine)
        group = find_group(self._process_group, 1 if fully_sharded else 2)
        if group is None:
            self._replicas = Alone()
            return
        if isinstance(self._replicas, Replicas) and self._replicas.ranks.are_of(group):
            return
        settings = {
            "num_clusters": self.num_clusters,
            "memory": self.memory,
            "jacobian_dtype": self._engine.dtype,
            "drop_nonfinite": self.drop_nonfinite,
        }
        ranks = Ranks(group, next(self.module.parameters()).device)
        settle(ranks, self.module, self.weighting, settings, fully_sharded=fully_sharded)
        self._replicas = self._engine.meet_others(ranks)

    def backward(
        self,
        loss: Tensor | None,
        cluster: Tensor | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Accumulate the multi-task update direction into the parameters' ``.grad``, as autograd would.

        With w = 1 this is ``torch.stack(cluster_losses_of_present_clusters).mean().backward()``. Called several
        times before an optimizer step (gradient accumulation), each call weighs its own batch and adds its own
        direction. Parameters outside the wrapped model that the loss depends on get the gradient of the mean of
        the cluster losses when the Jacobian is formed, and of the weighted loss when it is not.

        Args:
            loss: per-sample losses [B], floating point, computed from this wrapper's output. None, without a
                forward: this process takes part in the step of several without samples of its own.
            cluster: int64 [B], if the losses are not those of the last forward's samples in their order.
            scaler: the GradScaler of float16 training. Give it here and do not scale the loss: ``.grad`` comes
                out scaled, for ``scaler.step(optimizer)``, while the weights are those of the unscaled gradients.
                Where ``.grad`` overflowed, which the scaler answers by skipping the step, the weighting's state
                stays as it was; where cluster gradients did, the weighting is not called, and the weights are 1.

        Raises:
            TypeError, ValueError: the loss is not as stated.
            RuntimeError: no forward with a cluster preceded.
        """
        with self._one_thread():
            self._backward(loss, cluster, scaler)

    def _backward(
        self, loss: Tensor | None, cluster: Tensor | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        if loss is None:
            self._meet_other_processes()
        if not self._syncing:
            self._accumulate(loss, cluster, scaler)
            return
        with self._replicas.telling_before_losses():
            needed = self._needs_gradients_by_cluster()
            if loss is None:
                step, loss, cluster = self._step_without_samples()
            else:
                step, cluster = self._end_step(loss, cluster)
                needed = step.by_cluster or step.only is not None
            scale = None if scaler is None else scaler.scale(torch.ones((), device=loss.device))
            accumulated = self._end_accumulation(scale is not None)
            store = self._store(step, accumulated) if needed else None  # may find no memory, which is told
        earlier = None if accumulated is None else accumulated.totals
        losses, present, totals = self._replicas.losses(
            loss, cluster, self.num_clusters, needed, scale, earlier
        )
        number = present.sum()
        if accumulated is None or totals is None:
            objective, factors = losses.sum() / number, None
        else:
            objective, factors = loss.sum() / accumulated.unit, accumulated.factors(totals)
        with nullcontext() if scale is None else self._undone_where_skipped():
            if needed:
                self._backward_by_cluster(
                    step, losses, present, scale, _scaled(objective, scale), store, factors
                )
            else:
                self._backward_losses(step, losses, present, scale, _scaled(objective, scale))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let the backwards inside only add up their batches; the next one outside weighs all of them as one.

        The losses of the clusters are then means over the samples of all these batches, and processes exchange
        gradients once. Forwards belong inside, too. Whatever the weighting, gradients are formed by cluster, in
        the Jacobian's memory. `last` and ``.grad`` of the model stay as they are until the backward outside.
        """
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    @property
    def accumulates(self) -> bool:
        """Whether the next backward belongs to a step of several, because of `no_sync`."""
        return not self._syncing or self._accumulation is not None

    def _accumulate(
        self, loss: Tensor | None, cluster: Tensor | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        """Run a backward whose gradients by cluster wait for the next one's."""
        if loss is None:
            return
        step, cluster = self._end_step(loss, cluster)
        if not step.by_cluster and step.only is None:
            raise RuntimeError("expected the forward within no_sync(), as its backward is, found it outside")
        totals = tally(loss, cluster, self.num_clusters)
        if self._accumulation is None:
            self._accumulation = Accumulation(len(loss), scaler is not None, torch.zeros_like(totals))
        accumulated = self._accumulation
        _refuse_other_scale(accumulated, scaler is not None)
        objective = loss.sum() / accumulated.unit
        try:
            accumulated.store = self._store(step, accumulated)
            self._collect(step, objective if scaler is None else scaler.scale(objective), accumulated.store)
        except Exception as error:
            accumulated.failed = f"{type(error).__name__}: {error}"
            raise
        accumulated.totals += totals

    def _end_accumulation(self, scaled: bool) -> Accumulation | None:
        """Return what the backwards before have left, if there are any.

        Raises:
            RuntimeError: one of them failed.
        """
        accumulated, self._accumulation = self._accumulation, None
        if isinstance(self._engine, Engine):
            self._engine.jacobian_in_use = False
        if accumulated is not None and accumulated.failed:
            raise RuntimeError(
                f"expected all backwards of a step to succeed, found an error: {accumulated.failed}"
            )
        if accumulated is not None:
            _refuse_other_scale(accumulated, scaled)
        return accumulated

    def _store(self, step: Step, accumulated: Accumulation | None) -> Any:
        """Return what takes the gradients of a step's backward, beside those accumulated before."""
        if isinstance(self._engine, FullyShardedEngine):
            return self._engine.store(step)
        if not step.by_cluster:
            if accumulated is not None and accumulated.store is not None:
                return accumulated.store
            return Rows(self._trainable(), self.num_clusters, self._engine.dtype)
        if accumulated is not None and isinstance(accumulated.store, Jacobian):
            accumulated.refuse_another(self._engine.jacobian)
            return accumulated.store
        fresh = self._engine.store(step)
        return fresh if accumulated is None else accumulated.take(fresh)

    def _collect(self, step: Step, objective: Tensor, store: Any) -> None:
        """Run a backward whose gradients go to a store."""
        if step.by_cluster:
            if isinstance(self._engine, Engine):
                self._engine.jacobian_in_use = not self._syncing
            self._engine.collect(step, objective, store)
        elif step.only is not None:
            collect_plain(self._trainable(), objective, store, step.only, self._plain_arrivals)

    def _tell_arrivals(self, step: Step, store: Any, gradients: Any) -> None:
        """Let what is exchanged with other processes leave while the backward goes on."""
        if not isinstance(gradients, ShardedJacobian):
            return
        expected: Mapping[int, int] = {}
        if step.by_cluster and isinstance(self._engine, Engine):
            expected = self._engine.expected(step)
        elif step.only is not None:
            expected = self._plain_arrivals.expected(self._trainable())
        store.arrivals = Arrivals(expected, gradients.complete)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def _step_without_samples(self) -> tuple[Step, Tensor, Tensor]:
        """Return a step, losses [0] and clusters [0] for a process that has no samples."""
        if isinstance(self._engine, FullyShardedEngine):
            raise ValueError(
                "loss: expected per-sample losses, found None, with a fully sharded model, whose every forward is "
                "all processes'"
            )
        if not isinstance(self._replicas, Replicas):
            raise ValueError(
                "loss: expected per-sample losses, found None, which is for one of several processes"
            )
        self._step = None
        parameter = next(self.module.parameters())
        loss = torch.zeros(0, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        return Step(False), loss, torch.zeros(0, dtype=torch.int64, device=parameter.device)

    def _end_step(self, loss: Tensor, cluster: Tensor | None) -> tuple[Step, Tensor]:
        """Return the step that the loss belongs to, and the clusters of its samples, after checking both."""
        step = self._step
        if step is None or step.cluster is None:
            raise RuntimeError("expected a forward with cluster=... before backward, found none")
        own = cluster is None
        if cluster is None:
            cluster = step.cluster
        else:
            check_cluster(cluster, self.num_clusters)
        check_loss(loss, cluster)
        self._refuse_device(loss)
        if not own and step.only is not None and not bool((cluster == step.only).all()):
            raise ValueError(
                f"cluster: expected that of the forward, {step.only}, for all samples here, found others"
            )
        if self.last is None:
            refuse_scaled(loss)
        self._step = None  # a failure from here on does not block the next step
        if step.by_cluster or step.measured:
            step.keep_passes_of(loss)
            if own:
                self._engine.check_losses(step, loss)
            step.take_outputs()
        return step, upload(cluster, loss.device)

    def _refuse_device(self, loss: Tensor) -> None:
        device = next(self.module.parameters()).device
        if loss.device != device:
            raise ValueError(f"loss: expected it on the model's device {device}, found {loss.device}")

    def _needs_gradients_by_cluster(self) -> bool:
        weighting = self.weighting
        asked = isinstance(weighting, GramianWeighting) and weighting.needs_gramian
        return asked or self.measure_gramian or self.drop_nonfinite or self.accumulates

    def _measures_beside(self) -> bool:
        """Tell whether the Gramian is only looked at: it is then formed beside a step that stays the plain one.

        Several processes form it in the step's own backward, whose collectives would otherwise double.
        """
        weighting = self.weighting
        asked = isinstance(weighting, GramianWeighting) and weighting.needs_gramian
        others = asked or self.drop_nonfinite or self.accumulates
        return self.measure_gramian and not others and not isinstance(self._replicas, Replicas)

    def _backward_losses(
        self, step: Step, losses: Tensor, present: Tensor, scale: Tensor | None, plain: Tensor
    ) -> None:
        """One plain backward of the weighted loss; the Gramian of the plain one, if it is measured."""
        if isinstance(self.weighting, GramianWeighting):
            weights = self._replicas.weights(self.weighting(None, present))
            objective = (weights * losses).sum() / present.sum()
        else:
            objective, weights = self._weigh_losses(losses, present)
            objective, weights = self._replicas.objective(objective, weights, losses, present)
        repeats = [each.repeat for each in step.passes if each.repeat is not None]
        gramian, slopes = None, []
        if any(each.differs for each in repeats):
            means = [_scaled(loss / present.sum(), scale) for loss in losses]
            gramian = gramian_one_by_one(means, self._trainable())
        else:
            slopes = [each.slopes(plain) for each in repeats]
        with self._replicas.adding_up(self._trainable()):
            _scaled(objective, scale).backward()
        if step.measured:
            gramian = self._measure(step, slopes) if gramian is None else gramian
            gramian = gramian * present.sum() ** 2
            gramian = gramian if scale is None else gramian / scale.double() ** 2
        self.last = StepRecord(losses.detach(), weights.detach(), present, gramian)

    def _measure(self, step: Step, slopes: list[list[Tensor | None]]) -> Tensor:
        """Return the Gramian of a plain step's gradients, from forwards that are repeated without consequences."""
        again, before, repeated = Step(by_cluster=True), ModelState(self.module), []
        try:
            with torch.enable_grad(), grads_set_aside(self._trainable()):
                for each, by_output in zip(step.passes, slopes, strict=True):
                    assert each.repeat is not None
                    repeated.append(each.repeat.objective(self._engine, again, by_output))
                store = self._store(again, None)
                self._collect(again, torch.stack(repeated).sum(), store)
                gramian: Tensor = store.gramian()
        finally:
            before.restore()
        self._engine.release()
        return gramian

    def _backward_by_cluster(
        self,
        step: Step,
        losses: Tensor,
        present: Tensor,
        scale: Tensor | None,
        objective: Tensor,
        store: Any,
        factors: Tensor | None,
    ) -> None:
        """Form the cluster gradients by one backward, weigh them, and add their combination to ``.grad``."""
        number = present.sum()
        # The forward has just found them: a walk over the modules takes as long as some operations.
        trainable = self._engine.parameters if step.by_cluster else self._trainable()
        dtype = self._sum_dtype(trainable)

        def again(weights: Tensor) -> None:
            with self._engine.during_backward():
                weighted = (weights.to(losses.dtype) * losses).sum() / number
                _scaled(weighted, scale).backward(inputs=self._engine.leaves)

        # Row k of J is the gradient of L_k / n: the form in which the losses enter the published methods.
        gradients = self._replicas.reader(store, factors)
        with self._replicas.telling_before_gradients(gradients):
            self._tell_arrivals(step, store, gradients)
            self._collect(step, objective, store)
        store.arrivals = None
        advising = self._engine if scale is None and isinstance(self._replicas, Alone) else None
        if isinstance(advising, Engine):
            advising.note_backward()
        gramian = gradients.gramian() * number**2
        if isinstance(advising, Engine):
            advising.advise()
        if scale is not None:
            gramian = gramian / scale.double() ** 2
        dropped = None
        if self.drop_nonfinite:
            finite = (
                losses.isfinite() if scale is not None else losses.isfinite() & gramian.diagonal().isfinite()
            )
            dropped, present = present & ~finite, present & finite
            gradients.drop(dropped)
            losses = torch.where(dropped, 0, losses)
            gramian = torch.where(dropped.unsqueeze(0) | dropped.unsqueeze(1), 0, gramian)
        weights = self._replicas.weights(self._weigh(losses, gramian, present, scale, dtype))
        shares = weights if dropped is None else weights * (number / present.sum().clamp(min=1))
        square = gradients.update(shares.to(dtype), again)
        norm = None if square is None else square.sqrt().to(dtype)
        only_measured = isinstance(self.weighting, LossWeighting) and not self.drop_nonfinite
        if only_measured:
            self._engine.release()
        self.last = StepRecord(losses.detach(), weights.detach(), present, gramian, norm, dropped)

    def _weigh(
        self, losses: Tensor, gramian: Tensor, present: Tensor, scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Ask the weighting for its weights [K]; in an overflowed step of a GradScaler, 1 without asking."""
        # Reading the flag costs no more than the scaler's own step, which reads its flag right after.
        if scale is not None and not bool(gramian.isfinite().all()):
            return present.to(dtype)
        if isinstance(self.weighting, GramianWeighting):
            # Between Nash's refreshes the Gramian was only measured, and is not passed on.
            given = _within(gramian, dtype) if self.weighting.needs_gramian else None
            weights: Tensor = self.weighting(given, present)
            return weights.detach()
        objective, weights = self._weigh_losses(losses.detach().requires_grad_(), present)
        learned = [p for p in self.weighting.parameters() if p.requires_grad]
        if learned:
            _scaled(objective, scale).backward(inputs=learned)
        return weights.detach()

    def _sum_dtype(self, trainable: Sequence[nn.Parameter]) -> torch.dtype:
        """Return the dtype that sums over stored gradients are trusted in: float32, or float64 where one is."""
        stored = self._engine.dtype
        dtypes = {stored} if stored else {p.dtype for p in trainable}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def _weigh_losses(self, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighting's scalar and the weights w_k = n ∂scalar/∂L_k that it implies."""
        objective = self.weighting(losses, present)
        (slopes,) = torch.autograd.grad(objective, losses, retain_graph=True)
        return objective, slopes * present.sum()

    @contextmanager
    def _undone_where_skipped(self) -> Iterator[None]:
        """Put the weighting's state back where .grad has overflowed, so that a scaler will skip the step."""
        before = copy.deepcopy(self.weighting.state_dict())
        yield
        if not before or self.last is None:
            return
        norm = self.last.grad_norm
        if norm is None:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            # The largest element, unlike a sum of squares, overflows in no dtype.
            norm = torch.nn.utils.get_total_norm(
                [sparse_values(g) if g.is_sparse else g for g in grads], math.inf
            )
        # Reading it costs no more than the scaler's own step, which reads such a flag right after.
        if not bool(norm.isfinite()):
            self.weighting.load_state_dict(before)

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Refuse a call while one of another thread runs."""
        if not self._calls.acquire(blocking=False):
            raise RuntimeError(
                "expected one thread at a time in a ClusteredMTL, found a call while that of another thread runs; "
                "give every thread a wrapper and a model of its own"
            )
        try:
            yield
        finally:
            self._calls.release()

    def _refuse_other_threads(self) -> None:
        """Notice a forward while another thread's step waits for its backward: they would share one."""
        if self._step is not None and self._step.thread != threading.get_ident():
            raise RuntimeError(
                "expected the steps of one thread at a time in a ClusteredMTL, found a forward while the step of "
                "another thread waits for its backward; give every thread a wrapper and a model of its own"
            )

    def _refuse_lost_gradients(self) -> None:
        """Notice that the last output was differentiated by something other than `backward`."""
        if self._step is not None and self._step.bypassed:
            self._step = None
            raise RuntimeError(
                "expected mtl.backward(loss) after the last forward, found gradients written by another backward "
                "(loss.backward()?); they were not weighted"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Start anew when copied or pickled: a graph that waits for its backward is not the copy's."""
        fresh = {
            "_step": None,
            "_accumulation": None,
            "_replicas": Alone(),
            "_plain_arrivals": PlainArrivals(),
            "_calls": None,
        }
        return self.__dict__ | fresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy a lock of its own."""
        super().__setstate__(state | {"_calls": threading.RLock()})

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the model's own state, under the model's own names.

        Within another module, it is that of model and weighting, under ``module.`` and ``weighting.``.
        """
        if prefix or len(args) > 1:
            return super().state_dict(*args, prefix=prefix, **kwargs)
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the model's own state."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)


def _bare(
    model: nn.Module, group: torch.distributed.ProcessGroup | None
) -> tuple[nn.Module, torch.distributed.ProcessGroup | None]:
    """Take a model out of `DistributedDataParallel`; return it with the process group."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        _logger.info(
            "ClusteredMTL: took the model out of DistributedDataParallel, whose averaging would see no update by "
            "cluster; ClusteredMTL adds the gradients up itself, in the same process group"
        )
        if group is None and model.process_group is not torch.distributed.group.WORLD:
            group = model.process_group
        return model.module, group
    wrapped = next((m for m in model.modules() if isinstance(m, _DATA_PARALLEL)), None)
    if wrapped is not None:
        raise TypeError(
            f"model: expected the bare model, found {type(wrapped).__name__}, whose averaging would see the "
            "clusters' gradients and not the update"
        )
    return model, group


def _refuse_with_shards(engine: EngineName, memory: Memory) -> None:
    if engine == "grouped":
        raise ValueError(
            "engine='grouped': expected a model that is not sharded, found one in fully_shard, whose gradients "
            "are formed cluster after cluster; use engine='auto'"
        )
    if memory == "lean":
        raise ValueError(
            "memory='lean': expected a model that is not sharded, found one in fully_shard, where every process "
            "keeps its shard of the Jacobian alone; use memory='full', with jacobian_dtype=torch.bfloat16 to "
            "halve it"
        )


def _forward_with_a_warning(
    mtl: ClusteredMTL, cluster: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    _warn_uncompiled()
    return mtl._forward(cluster, args, kwargs)


@functools.cache
def _warn_uncompiled() -> None:
    _logger.warning(
        "ClusteredMTL is not compiled, nor is the model in it: compile the model instead, as in "
        "ClusteredMTL(torch.compile(model), ...)"
    )


def _within(gramian: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a float64 Gramian in the dtype whose rounding its gradients have, to be trusted no further.

    Where float32 has little room left, a power of four brings the largest entry to about 2⁶⁰: a common scale that
    changes no weights of the methods here, and leaves room for norms that are 10²⁸ times smaller.
    """
    if dtype == torch.float64:
        return gramian
    exponent = torch.frexp(gramian.diagonal().amax()).exponent
    far = exponent.abs() > _ROOM
    return torch.ldexp(gramian, torch.where(far, _ROOM - 2 * (exponent // 2), 0)).to(dtype)


def _refuse_other_scale(accumulated: Accumulation, scaled: bool) -> None:
    if accumulated.scaled != scaled:
        raise ValueError("scaler: expected one in all backwards of a step or in none, found it in some")


def _scaled(objective: Tensor, scale: Tensor | None) -> Tensor:
    return objective if scale is None else objective * scale


def check_loss(loss: Tensor, cluster: Tensor) -> None:
    """Refuse anything but the losses [B] of samples with these clusters, with a graph."""
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        found = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss: expected per-sample losses, a floating-point tensor [B], found {found}")
    if loss.shape != cluster.shape:
        raise ValueError(
            f"loss: expected per-sample losses of shape {list(cluster.shape)} (for example from ops.sample_mse), "
            f"found {list(loss.shape)}"
        )
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected a loss that depends on the wrapped model's output, found one without gradient"
        )
