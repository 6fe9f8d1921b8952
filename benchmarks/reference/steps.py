"""Whole training steps up to ``.grad`` the published way; the optimizer's step is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .gradients import ClusterGradients, cluster_gradients, cluster_means
from .weighting import nash_weights, pcgrad, uncertainty_weighting, update_direction


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        inputs: the model's positional arguments, batch first.
        target: what the model predicts, for example the noise.
        cluster: [B] int64, the cluster of every sample.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    cluster: Tensor

    def narrow(self, start: int, length: int) -> Batch:
        """Return ``length`` consecutive samples."""
        inputs = tuple(x.narrow(0, start, length) for x in self.inputs)
        return Batch(inputs, self.target.narrow(0, start, length), self.cluster.narrow(0, start, length))


#: (model, batch) to per-sample losses [B]
LossFn = Callable[[nn.Module, Batch], Tensor]


def plain_step(model: nn.Module, loss_fn: LossFn, batch: Batch) -> Tensor:
    """Train as usual on the mean loss of the batch; returns the per-sample losses."""
    losses = loss_fn(model, batch)
    losses.mean().backward()
    return losses.detach()


def uw_step(model: nn.Module, loss_fn: LossFn, batch: Batch, log_variances: Tensor) -> Tensor:
    """Train on the uncertainty-weighted loss, one backward into the model and u; returns that loss."""
    means = cluster_means(loss_fn(model, batch), batch.cluster, len(log_variances))
    present = torch.tensor([mean is not None for mean in means], device=log_variances.device)
    losses = torch.stack([log_variances.new_zeros(()) if mean is None else mean for mean in means])
    loss = uncertainty_weighting(losses, log_variances, present)
    loss.backward()
    return loss.detach()


def pcgrad_step(model: nn.Module, loss_fn: LossFn, batch: Batch, orders: Tensor) -> ClusterGradients:
    """Train on the projected gradients, K backwards; ``orders`` is that of ``pcgrad``."""
    parameters = _trainable(model)
    gradients = cluster_gradients(loss_fn(model, batch), batch.cluster, parameters, len(orders))
    _accumulate(parameters, pcgrad(gradients.jacobian, orders) / gradients.present.sum())
    return gradients


def nash_step(model: nn.Module, loss_fn: LossFn, batch: Batch, num_clusters: int) -> ClusterGradients:
    """Train on the Nash bargaining solution, K backwards.

    The weighted gradient is summed from the Jacobian, where the released code spends one more backward pass
    on the weighted loss. Clipping the gradient norm to 1, as published, is the caller's.
    """
    parameters = _trainable(model)
    gradients = cluster_gradients(loss_fn(model, batch), batch.cluster, parameters, num_clusters)
    jacobian, present = gradients.jacobian, gradients.present
    weights = nash_weights(jacobian @ jacobian.T, present).to(jacobian.device)
    _accumulate(parameters, update_direction(jacobian, weights, present))
    return gradients


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _accumulate(parameters: Sequence[nn.Parameter], direction: Tensor) -> None:
    """Add the update to ``.grad``, as a backward pass would."""
    chunks = direction.split([p.numel() for p in parameters])
    for parameter, chunk in zip(parameters, chunks, strict=True):
        grad = chunk.view_as(parameter).to(parameter.dtype)
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
