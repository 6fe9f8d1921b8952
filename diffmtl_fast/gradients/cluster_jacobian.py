"""The gradients of a batch's clusters as a matrix, for analyses; training uses `ClusteredMTL`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import ops
from .._host import upload
from .batch import BatchLayout, check_cluster
from .clustered import check_loss
from .engine import Engine, EngineName
from .step import Step

#: Calls the model with the model's own arguments, on all samples of the batch.
Call: TypeAlias = Callable[..., Any]


class ClusterJacobian:
    """Gradients of K cluster losses, [K, P], from one forward and one backward of the batch.

    The same engines as in `ClusteredMTL`, with the same conditions on the model; nothing is written to ``.grad``
    of its parameters.

    Args:
        model: any module; P counts the elements of its parameters that require a gradient.
        num_clusters: K.
        engine: see `ClusteredMTL`.
        shared: see `ClusteredMTL`.

    Raises:
        ValueError: ``num_clusters < 1``, or an unknown engine.
    """

    def __init__(
        self,
        model: nn.Module,
        num_clusters: int,
        *,
        engine: EngineName = "auto",
        shared: Collection[str | int] = (),
    ) -> None:
        if num_clusters < 1:
            raise ValueError(f"num_clusters: expected at least 1, found {num_clusters}")
        self.num_clusters = num_clusters
        self._engine = Engine(model, num_clusters, engine, "full", shared, None)

    def __call__(self, loss: Callable[[Call], Tensor], cluster: Tensor, *, add: bool = False) -> Tensor:
        """Form the gradients of the mean loss of every cluster.

        Args:
            loss: given a function that calls the model, returns the losses [B] of the samples, each of which
                depends on its own sample alone.
            cluster: int64 [B], the cluster of each sample, 0..K-1.
            add: add to the gradients of the last call, which go on being kept, instead of forgetting them. The
                model must be the same.

        Returns:
            The mean losses, [K]; 0 for a cluster without samples.

        Raises:
            TypeError, ValueError: an argument is not as stated, or the model can't be split by cluster.
            RuntimeError: see `ClusteredMTL.forward`.
        """
        check_cluster(cluster, self.num_clusters)
        engine, layout, step = self._engine, BatchLayout(cluster, self.num_clusters), Step(by_cluster=True)
        called = False

        def model(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            called = True
            return engine.forward(step, layout, args, kwargs)

        with torch.enable_grad():
            engine.begin(engine.model)
            engine.jacobian_in_use = add
            sample_losses = loss(model)
            check_loss(sample_losses, cluster)
            if not called:
                raise ValueError(
                    "loss: expected it to call the model that it is given, found that it did not"
                )
            engine.check_losses(step, sample_losses)
            losses = ops.cluster_mean(sample_losses, upload(cluster, sample_losses.device), self.num_clusters)
            if not add:
                engine.jacobian.clear()
            engine.collect(step, losses.sum(), engine.jacobian)
        return losses.detach()

    def matrix(self, out: Tensor | None = None) -> Tensor:
        """Return the gradients in the order of ``model.parameters()``.

        Args:
            out: floating point [n, P], n <= K: where those of the first n clusters are written; by default a new
                matrix [K, P], in the dtype that the parameters' promote to.

        Raises:
            TypeError, ValueError: ``out`` is not as stated.
        """
        if out is not None:
            width = sum(parameter.numel() for parameter in self._engine.parameters)
            if not out.is_floating_point():
                raise TypeError(f"out: expected floating point, found {out.dtype}")
            if out.dim() != 2 or len(out) > self.num_clusters or out.shape[1] != width:
                raise ValueError(
                    f"out: expected shape [n, {width}], n <= {self.num_clusters}, found {list(out.shape)}"
                )
        return self._engine.jacobian.matrix(out)
