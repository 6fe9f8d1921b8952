"""`ClusteredMTL`: the wrapper that turns a plain training step into a multi-task one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..weighting import GramianWeighting, LossWeighting
from .jacobian import Jacobian
from .sliced import SlicedEngine

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
    """

    losses: Tensor
    weights: Tensor
    present: Tensor
    gramian: Tensor | None


class ClusteredMTL(nn.Module):
    """Train a diffusion model with one task per timestep cluster, at about the price of a plain step.

    Wraps a model like `DistributedDataParallel` does: call it with the model's own arguments plus `cluster`, and
    replace ``loss.mean().backward()`` by ``mtl.backward(loss)``, which fills the parameters' ``.grad``.

    Where the weighting needs only losses (or `NashMTL` is between refreshes), the step is the plain step. Where it
    needs the Gramian of the cluster gradients, the batch runs through the model in one slice per cluster, and one
    backward yields all of them: exact, as long as each sample's loss depends on that sample alone. Batch
    normalisation in training mode breaks that and is refused. An output or an argument is split or joined along
    dimension 0 if that has the size of the batch.

    Args:
        model: any module; its parameters are trained through their ``.grad`` as usual.
        num_clusters: K.
        weighting: a `LossWeighting` or a `GramianWeighting`.
        shared: names of keyword arguments, or positions of positional ones, that belong to the whole batch
            although their first dimension happens to equal its size.

    Attributes:
        module: the model.
        weighting: the weighting. `state_dict` is the model's alone, under the model's own names; save
            ``mtl.weighting.state_dict()`` beside it.
        last: the `StepRecord` of the last `backward`; None before the first.
        measure_gramian: set it to form the Gramian in the next steps, for logging, although the weighting does
            not need it. The update stays the weighting's.

    Raises:
        TypeError: an argument has the wrong type, or the model is already wrapped for data parallelism.
        ValueError: `num_clusters` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        num_clusters: int,
        weighting: LossWeighting | GramianWeighting,
        *,
        shared: Collection[str | int] = (),
    ) -> None:
        super().__init__()
        if isinstance(model, _DATA_PARALLEL):
            raise TypeError(
                f"model: expected the bare model, found {type(model).__name__}, whose averaging would see the "
                "slices of the batch and not the update"
            )
        if not isinstance(weighting, LossWeighting | GramianWeighting):
            raise TypeError(
                f"weighting: expected a LossWeighting or a GramianWeighting, found {type(weighting).__name__}"
            )
        if num_clusters < 1:
            raise ValueError(f"num_clusters: expected at least 1, found {num_clusters}")
        self.module = model
        self.weighting = weighting
        self.num_clusters = num_clusters
        self.measure_gramian = False
        self.last: StepRecord | None = None
        self._warned_of_processes = False
        self._engine = SlicedEngine(model, num_clusters, shared)
        self._cluster: Tensor | None = None  # of the forward that waits for its backward
        self._jacobian: Jacobian | None = None  # set while that forward ran in slices
        self._witness: list[
            tuple[nn.Parameter, tuple[int, int] | None]
        ] = []  # a parameter and its .grad then

    def forward(self, *args: Any, cluster: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            *args: the model's positional arguments.
            cluster: int64 [B], the cluster of each sample, 0..K-1 in any order (sorted is fastest). Without it,
                or where gradients are disabled, this is a plain call of the model.
            **kwargs: the model's keyword arguments.

        Returns:
            What the model returns.

        Raises:
            TypeError, ValueError: `cluster` is not as stated, or the model can't be split (see the class).
            RuntimeError: the last output was differentiated by something other than `backward`.
        """
        if cluster is None or not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        _check_cluster(cluster, self.num_clusters)
        self._refuse_lost_gradients()
        if self._cluster is None:  # else several forwards share one backward, and so the same leaves
            self._jacobian = self._engine.prepare() if self._forms_jacobian() else None
        self._cluster = cluster
        if self._jacobian is None:
            # One parameter tells whether some backward came by; walking over all of them would cost a small step.
            first = next((p for p in self.module.parameters() if p.requires_grad), None)
            self._witness = [] if first is None else [(first, _grad_versions([first])[0])]
            return self.module(*args, **kwargs)
        self._warn_of_processes()
        return self._engine.forward(cluster, args, kwargs)

    def backward(self, loss: Tensor, cluster: Tensor | None = None) -> None:
        """Accumulate the multi-task update direction into the parameters' ``.grad``, as autograd would.

        With w = 1 this is ``torch.stack(cluster_losses_of_present_clusters).mean().backward()``. Called several
        times before an optimizer step (gradient accumulation), each call weighs its own batch and adds its own
        direction. Parameters outside the wrapped model that the loss depends on get the gradient of the mean of
        the cluster losses when per-cluster gradients are formed, and of the weighted loss when they are not.

        Args:
            loss: per-sample losses [B], floating point, computed from this wrapper's output.
            cluster: int64 [B], if the losses are not those of the last forward's samples in their order.

        Raises:
            TypeError, ValueError: the loss is not as stated.
            RuntimeError: no forward with a cluster preceded.
        """
        if self._cluster is None:
            raise RuntimeError("expected a forward with cluster=... before backward, found none")
        cluster = self._cluster if cluster is None else cluster
        _check_cluster(cluster, self.num_clusters)
        _check_loss(loss, cluster)
        present = torch.zeros(self.num_clusters, dtype=torch.bool, device=loss.device)
        present = present.index_fill(0, cluster.to(loss.device), True)
        losses = ops.cluster_mean(loss, cluster.to(loss.device), self.num_clusters)
        jacobian = self._jacobian
        self._cluster, self._jacobian = (
            None,
            None,
        )  # first, so that a failure below does not block the next step
        if jacobian is None:
            self._backward_losses(losses, present)
        else:
            self._backward_jacobian(losses, present, jacobian)

    def _forms_jacobian(self) -> bool:
        weighting = self.weighting
        return self.measure_gramian or (isinstance(weighting, GramianWeighting) and weighting.needs_gramian)

    def _backward_losses(self, losses: Tensor, present: Tensor) -> None:
        """One plain backward of the weighted loss."""
        if isinstance(self.weighting, GramianWeighting):
            weights = self.weighting(None, present)
            objective = (weights * losses).sum() / present.sum()
        else:
            objective, weights = self._weigh_losses(losses, present)
        objective.backward()
        self.last = StepRecord(losses.detach(), weights.detach(), present, None)

    def _backward_jacobian(self, losses: Tensor, present: Tensor, jacobian: Jacobian) -> None:
        """Fill J by one backward of the mean loss, weigh its rows, add their combination to ``.grad``."""
        number = present.sum()
        parameters = self._engine.parameters
        before = _grad_versions(parameters)
        # Row k of J is the gradient of L_k / n: the form in which the losses enter the published methods.
        (losses.sum() / number).backward()
        if _grad_versions(parameters) != before:
            raise RuntimeError(
                "model: expected gradients in the slices' own leaves alone, found some in the parameters' .grad; "
                "a reentrant checkpoint recomputes outside its slice (pass use_reentrant=False to checkpoint), "
                "and a call without cluster= does not take part in the weighting"
            )
        gramian = jacobian.gram() * number**2
        if isinstance(self.weighting, GramianWeighting):
            # Between Nash's refreshes the Gramian was only measured, and is not passed on.
            weights = self.weighting(gramian if self.weighting.needs_gramian else None, present)
        else:
            objective, weights = self._weigh_losses(losses.detach().requires_grad_(), present)
            if any(p.requires_grad for p in self.weighting.parameters()):
                objective.backward(inputs=[p for p in self.weighting.parameters() if p.requires_grad])
        _accumulate(parameters, jacobian.combine(weights), jacobian.touched)
        self.last = StepRecord(losses.detach(), weights.detach(), present, gramian)

    def _weigh_losses(self, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighting's scalar and the weights w_k = n ∂scalar/∂L_k that it implies."""
        objective = self.weighting(losses, present)
        (slopes,) = torch.autograd.grad(objective, losses, retain_graph=True)
        return objective, slopes * present.sum()

    def _refuse_lost_gradients(self) -> None:
        """Notice that the last output was differentiated by something other than `backward`."""
        if self._cluster is None:
            return
        if self._jacobian is not None:
            lost, where = any(self._jacobian.touched), "they have not reached the parameters' .grad"
        else:
            lost = any(p.grad is not None and _grad_versions([p]) != [old] for p, old in self._witness)
            where = "they were not weighted"
        if lost:
            self._cluster, self._jacobian = None, None
            raise RuntimeError(
                "expected mtl.backward(loss) after the last forward, found gradients written by another backward "
                f"(loss.backward()?); {where}"
            )

    def _warn_of_processes(self) -> None:
        distributed = torch.distributed
        several = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        if several and not self._warned_of_processes:
            _logger.warning(
                "ClusteredMTL does not average cluster gradients between processes: each weighs its own batch, "
                "and .grad is left for you to average"
            )
            self._warned_of_processes = True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the model's own state, under the model's own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load the model's own state."""
        return self.module.load_state_dict(state_dict, *args, **kwargs)


def _grad_versions(parameters: list[nn.Parameter]) -> list[tuple[int, int] | None]:
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in parameters]


def _accumulate(parameters: list[nn.Parameter], direction: list[Tensor], touched: list[bool]) -> None:
    """Add to ``.grad`` like autograd: a parameter that took no part keeps what it had, None included."""
    for parameter, part, reached in zip(parameters, direction, touched, strict=True):
        if not reached:
            continue
        if parameter.grad is None:
            parameter.grad = part
        else:
            parameter.grad.add_(part)


def _check_cluster(cluster: Tensor, k: int) -> None:
    if not isinstance(cluster, Tensor) or cluster.dtype != torch.int64:
        found = cluster.dtype if isinstance(cluster, Tensor) else type(cluster).__name__
        raise TypeError(f"cluster: expected an int64 tensor [B], found {found}")
    if cluster.dim() != 1 or cluster.shape[0] == 0:
        raise ValueError(f"cluster: expected shape [B] with B >= 1, found {list(cluster.shape)}")
    if cluster.device.type == "cpu" and not 0 <= int(cluster.min()) <= int(cluster.max()) < k:
        raise ValueError(
            f"cluster: expected indices in 0..{k - 1}, found {int(cluster.min())}..{int(cluster.max())}"
        )


def _check_loss(loss: Tensor, cluster: Tensor) -> None:
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
