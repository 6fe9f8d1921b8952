"""`ClusteredMTL`: the wrapper that turns a plain training step into a multi-task one."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .._host import upload
from .._torch import sparse_values
from ..distributed import Alone, Ranks, Replicas, find_group, refuse_outer_wrapper, settle
from ..weighting import GramianWeighting, LossWeighting
from . import diagnostics
from .batch import BatchLayout, check_cluster
from .engine import Engine, EngineName, Memory
from .loss_check import refuse_scaled
from .parameters import refuse_hooks
from .step import Step
from .uncompiled import uncompiled

_logger = logging.getLogger("diffmtl_fast")
_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class StepRecord:
    """What the last `ClusteredMTL.backward` saw, for logging. Tensors stay on the device; nothing is averaged.

    Attributes:
        losses: [K], the mean loss of each cluster; 0 for an absent one.
        weights: w, [K], in the convention d = (1/n) Σ_k w_k g_k over the n present clusters; 0 for an absent one.
        present: bool [K], the clusters with samples in the batch.
        gramian: G = J Jᵀ, [K, K], float32 at least; None where the step formed no per-cluster gradients.
        grad_norm: the norm of all ``.grad`` of the model's trainable parameters, those included that earlier
            backwards left there, measured while it was written: the norm that `torch.nn.utils.clip_grad_norm_`
            would find. Pass it to `torch.nn.utils.clip_grads_with_norm_` to clip without another pass. Scaled as
            ``.grad`` is where there is a GradScaler. None where the step formed no per-cluster gradients, and with
            memory="lean".
    """

    losses: Tensor
    weights: Tensor
    present: Tensor
    gramian: Tensor | None
    grad_norm: Tensor | None = None

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
        process_group: the processes that train replicas of the model together, each on samples of its own; their
            steps are the step of one process with all of the samples. Default: the world, where torch.distributed
            is initialised; a model in `DistributedDataParallel` is taken out of it, and its group taken over.

    Attributes:
        module: the model.
        weighting: the weighting. `state_dict` is the model's alone, under the model's own names; save
            ``mtl.weighting.state_dict()`` beside it.
        last: the `StepRecord` of the last `backward`; None before the first.
        measure_gramian: set it to form the Gramian in the next steps, for logging, although the weighting does
            not need it. The update stays the weighting's.

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
        process_group: torch.distributed.ProcessGroup | None = None,
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
        if jacobian_dtype is not None and not jacobian_dtype.is_floating_point:
            raise ValueError(f"jacobian_dtype: expected a floating-point dtype, found {jacobian_dtype}")
        self.module = model
        self.weighting = weighting
        self.num_clusters = num_clusters
        self.memory = memory
        self.measure_gramian = False
        self.last: StepRecord | None = None
        self._process_group = process_group
        self._replicas = Alone()
        self._engine = Engine(model, num_clusters, engine, memory, shared, jacobian_dtype)
        self._step: Step | None = None  # that waits for its backward

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
        self._meet_other_processes()
        with self._replicas.telling_before_losses():
            return self._forward_by_cluster(cluster, args, kwargs)

    def _forward_by_cluster(self, cluster: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_cluster(cluster, self.num_clusters)
        self._refuse_lost_gradients()
        step = self._continue_or_begin()
        self._step = None  # a forward that fails leaves no step to finish
        if step.by_cluster:
            refuse_hooks(self.module, self._engine.parameters)
            output = self._engine.forward(step, BatchLayout(cluster, self.num_clusters), args, kwargs)
        else:
            output = step.watch(self.module(*args, **kwargs))
        step.cluster = cluster
        if step.passes:
            step.passes[-1].cluster = cluster
        self._step = step
        return output

    def _continue_or_begin(self) -> Step:
        """Return the step of this forward: that of the last one, if they can share a backward."""
        by_cluster, changed = self._needs_gradients_by_cluster(), False
        if by_cluster:
            if self.memory == "lean" and isinstance(self._replicas, Replicas):
                raise ValueError(
                    "memory='lean': expected one process, found several, which add up their Jacobians; use "
                    "memory='full', with jacobian_dtype=torch.bfloat16 to halve it"
                )
            changed = self._engine.begin(self.module)
        if self._step is None or changed or self._step.by_cluster != by_cluster:
            return Step(by_cluster)
        return self._step

    def _meet_other_processes(self) -> None:
        """Find the processes that train together; at their first step they settle that they do the same."""
        group = find_group(self._process_group)
        if group is None:
            self._replicas = Alone()
            return
        refuse_outer_wrapper()
        if isinstance(self._replicas, Replicas) and self._replicas.ranks.group is group:
            return
        settings = {
            "num_clusters": self.num_clusters,
            "memory": self.memory,
            "jacobian_dtype": self._engine.dtype,
        }
        ranks = Ranks(group, next(self.module.parameters()).device)
        settle(ranks, self.module, self.weighting, settings)
        self._replicas = Replicas(ranks, self.num_clusters)

    def backward(
        self, loss: Tensor, cluster: Tensor | None = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Accumulate the multi-task update direction into the parameters' ``.grad``, as autograd would.

        With w = 1 this is ``torch.stack(cluster_losses_of_present_clusters).mean().backward()``. Called several
        times before an optimizer step (gradient accumulation), each call weighs its own batch and adds its own
        direction. Parameters outside the wrapped model that the loss depends on get the gradient of the mean of
        the cluster losses when the Jacobian is formed, and of the weighted loss when it is not.

        Args:
            loss: per-sample losses [B], floating point, computed from this wrapper's output.
            cluster: int64 [B], if the losses are not those of the last forward's samples in their order.
            scaler: the GradScaler of float16 training. Give it here and do not scale the loss: ``.grad`` comes
                out scaled, for ``scaler.step(optimizer)``, while the weights are those of the unscaled gradients.
                Where ``.grad`` overflowed, which the scaler answers by skipping the step, the weighting's state
                stays as it was; where cluster gradients did, the weighting is not called, and the weights are 1.

        Raises:
            TypeError, ValueError: the loss is not as stated.
            RuntimeError: no forward with a cluster preceded.
        """
        with self._replicas.telling_before_losses():
            step, cluster = self._end_step(loss, cluster)
            scale = None if scaler is None else scaler.scale(torch.ones((), device=loss.device))
        losses, present = self._replicas.losses(loss, cluster, self.num_clusters, step.by_cluster, scale)
        with nullcontext() if scale is None else self._undone_where_skipped():
            if step.by_cluster:
                self._backward_by_cluster(step, losses, present, scale)
            else:
                self._backward_losses(losses, present, scale)

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
        if self.last is None:
            refuse_scaled(loss)
        self._step = None  # a failure from here on does not block the next step
        if step.by_cluster:
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
        return self.measure_gramian or (isinstance(weighting, GramianWeighting) and weighting.needs_gramian)

    def _backward_losses(self, losses: Tensor, present: Tensor, scale: Tensor | None) -> None:
        """One plain backward of the weighted loss."""
        if isinstance(self.weighting, GramianWeighting):
            weights = self._replicas.weights(self.weighting(None, present))
            objective = (weights * losses).sum() / present.sum()
        else:
            objective, weights = self._weigh_losses(losses, present)
        with self._replicas.adding_up([p for p in self.module.parameters() if p.requires_grad]):
            _scaled(objective, scale).backward()
        self.last = StepRecord(losses.detach(), weights.detach(), present, None)

    def _backward_by_cluster(self, step: Step, losses: Tensor, present: Tensor, scale: Tensor | None) -> None:
        """Form the cluster gradients by one backward, weigh them, and add their combination to ``.grad``."""
        number = present.sum()

        def again(weights: Tensor) -> None:
            with self._engine.during_backward():
                weighted = (weights.to(losses.dtype) * losses).sum() / number
                _scaled(weighted, scale).backward(inputs=self._engine.leaves)

        # Row k of J is the gradient of L_k / n: the form in which the losses enter the published methods.
        objective = _scaled(losses.sum() / number, scale)
        store = self._engine.store(step)
        with self._replicas.telling_before_gradients(self._engine.parameters):
            self._engine.collect(step, objective, store)
        gradients = self._replicas.reader(store)
        gramian = gradients.gramian() * number**2
        if scale is not None:
            gramian = gramian / scale.to(gramian.dtype) ** 2
        weights = self._replicas.weights(self._weigh(losses, gramian, present, scale))
        square = gradients.update(weights.to(gramian.dtype), again)
        norm = None if square is None else square.sqrt()
        if isinstance(self.weighting, LossWeighting):  # the Gramian was only measured
            self._engine.release()
        self.last = StepRecord(losses.detach(), weights.detach(), present, gramian, norm)

    def _weigh(self, losses: Tensor, gramian: Tensor, present: Tensor, scale: Tensor | None) -> Tensor:
        """Ask the weighting for its weights [K]; in an overflowed step of a GradScaler, 1 without asking."""
        # Reading the flag costs no more than the scaler's own step, which reads its flag right after.
        if scale is not None and not bool(gramian.isfinite().all()):
            return present.to(gramian.dtype)
        if isinstance(self.weighting, GramianWeighting):
            # Between Nash's refreshes the Gramian was only measured, and is not passed on.
            weights: Tensor = self.weighting(gramian if self.weighting.needs_gramian else None, present)
            return weights.detach()
        objective, weights = self._weigh_losses(losses.detach().requires_grad_(), present)
        learned = [p for p in self.weighting.parameters() if p.requires_grad]
        if learned:
            _scaled(objective, scale).backward(inputs=learned)
        return weights.detach()

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
        return self.__dict__ | {"_step": None, "_replicas": Alone()}

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
