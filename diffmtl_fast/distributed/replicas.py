"""Data parallel training: every process has a replica of the model and samples of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from .._host import upload
from .._torch import data_parallel_processes, fully_sharded_modules
from ..ops.cluster_mean import cluster_sizes
from .arrivals import PlainArrivals
from .buckets import Workspace
from .gradient_sums import GradientSums
from .group_reference import GroupReference
from .ranks import Ranks
from .scaled import Scaled
from .sharded_jacobian import ShardedJacobian

_logger = logging.getLogger("diffmtl_fast")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of losses

if TYPE_CHECKING:
    from ..gradients.stores import Gradients, Jacobian, Rows, Store


def find_group(given: GroupReference | None, at_least: int = 2) -> dist.ProcessGroup | None:
    """Return the process group of several processes to train with: the given one or the world; None where alone.

    Args:
        given: a process group.
        at_least: how many processes are several.

    Raises:
        ValueError: this process does not belong to the given group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if given is None else given()
    size = dist.get_world_size(group)
    if size < 0:
        raise ValueError("process_group: expected a group that this process belongs to, found another")
    return group if size >= at_least else None


def refuse_outer_wrapper(wrapper: nn.Module) -> None:
    """Refuse a forward that `DistributedDataParallel` has called, and a wrapper that `fully_shard` was called on.

    Args:
        wrapper: the one that runs its forward.

    Raises:
        TypeError: it has, or it was.
    """
    if wrapper in fully_sharded_modules(wrapper):
        raise TypeError(
            "expected ClusteredMTL around the sharded model, found fully_shard around ClusteredMTL; call "
            "fully_shard on the model before ClusteredMTL(model, ...)"
        )
    if data_parallel_processes() > 1:
        raise TypeError(
            "expected ClusteredMTL around the bare model, found it within DistributedDataParallel; leave that "
            "out: ClusteredMTL(model, ...) adds the gradients up itself (process_group=)"
        )


class Alone:
    """One process: there is nothing to exchange. The methods are those of `Replicas`."""

    def telling_before_losses(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def telling_before_gradients(self, gradients: Gradients) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def losses(
        self,
        loss: Tensor,
        cluster: Tensor,
        num_clusters: int,
        by_cluster: bool,
        scale: Tensor | None,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the mean loss of every cluster [K], the clusters that are present, bool [K], and totals.

        With `earlier`, the totals of other batches (float64 [2, K]: numbers of samples, sums of losses), all of
        this is of the batches together.
        """
        if earlier is not None:
            counts = cluster_sizes(cluster, num_clusters)
            totals = earlier + torch.stack(
                [counts, ops.cluster_mean(loss.detach(), cluster, num_clusters) * counts]
            )
            return (totals[1] / totals[0].clamp(min=1)).to(loss.dtype), totals[0] > 0, totals
        present = torch.zeros(num_clusters, dtype=torch.bool, device=loss.device)
        return ops.cluster_mean(loss, cluster, num_clusters), present.index_fill(0, cluster, True), None

    def weights(self, weights: Tensor) -> Tensor:
        """Return the weights."""
        return weights

    def objective(
        self, objective: Tensor, weights: Tensor, losses: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the scalar that a weighting of losses made of them, and its weights."""
        return objective, weights

    def adding_up(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def only_cluster(self, counts: Sequence[int]) -> int | None:
        """Return None: one process finds all clusters in its batch."""
        return None

    def reader(self, store: Store | Rows, factors: Tensor | None = None) -> Gradients:
        """Return what reads the store, its rows times factors [K]."""
        return cast("Store", store) if factors is None else Scaled(cast("Store", store), factors)


class Replicas(Alone):
    """Several processes, whose steps together are the step of one process with all of their samples.

    Losses are those of the whole batch, and what a rank differentiates is its part of them; so the gradients of
    all ranks add up to those of the whole batch, by cluster or not.

    Args:
        ranks: the processes.
        num_clusters: K.
    """

    _SETTINGS = (
        "the formation of cluster gradients in this step (the weighting's state, measure_gramian)",
        "the scale of the GradScaler",
    )

    def __init__(self, ranks: Ranks, num_clusters: int) -> None:
        self.ranks = ranks
        self._workspace, self._arrivals = Workspace(), PlainArrivals()
        self._count = 2 * num_clusters + len(self._SETTINGS) + 1
        self._held: list[list[int]] = []  # of every rank, the clusters that it has samples of in this step
        self._most = num_clusters  # clusters of a rank, as the log was told

    def telling_before_losses(self) -> AbstractContextManager[None]:
        """Tell the other ranks of an error inside, where they come to `losses`."""
        return self.ranks.telling(self._count)

    @contextmanager
    def telling_before_gradients(self, gradients: Any) -> Iterator[None]:
        """Tell the other ranks of an error inside, where they come to exchange the parameters' gradients.

        Args:
            gradients: what has more to exchange: `fail` takes part in that, and tells.
        """
        try:
            yield
        except Exception as error:
            try:
                gradients.fail(error)
            except RuntimeError as lost:  # as it must: all ranks fail together, or the others are gone
                _logger.debug("rank %d told of its error: %s", self.ranks.rank, lost)
            raise

    def losses(
        self,
        loss: Tensor,
        cluster: Tensor,
        num_clusters: int,
        by_cluster: bool,
        scale: Tensor | None,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the mean loss of every cluster over all ranks [K], and the clusters that are present on any.

        The gradient of the losses is that of this rank's part of them.

        Raises:
            RuntimeError: a rank failed before it came here.
            ValueError: ranks differ in what they are about to do, or none has samples.
        """
        local = ops.cluster_mean(loss, cluster, num_clusters)
        counts = cluster_sizes(cluster, num_clusters)
        sums = local.detach().double() * counts
        settings = counts.new_tensor([by_cluster, 1], dtype=torch.float64)
        if scale is not None:
            settings[1] = scale
        kind = counts.new_tensor([_DTYPES.index(loss.dtype) if len(loss) else -1], dtype=torch.float64)
        own = torch.cat([counts.double(), sums])
        if earlier is not None:
            own += earlier.flatten()
        rows = self.ranks.share(torch.cat([own, settings, kind]))
        self._refuse_differences(rows[:, 2 * num_clusters : -1])
        if not bool((rows[:, :num_clusters] > 0).any()):
            raise ValueError("loss: expected samples on some rank, found none on any")
        dtype = _DTYPES[int(rows[:, -1].max())]  # a rank without samples knows of none
        self._held = [row.nonzero().flatten().tolist() for row in rows[:, :num_clusters]]
        if by_cluster:
            self._tell(num_clusters)
        numbers, totals = upload(rows[:, : 2 * num_clusters].sum(0), loss.device).split(num_clusters)
        means = (totals / numbers.clamp(min=1)).to(dtype)
        part = local.to(dtype) * (counts / numbers.clamp(min=1)).to(dtype)
        return means + (part - part.detach()), numbers > 0, torch.stack([numbers, totals])

    def _tell(self, num_clusters: int) -> None:
        most = max(map(len, self._held))
        if most < num_clusters and most != self._most:
            _logger.info(
                "ClusteredMTL: cluster-parallel: no rank has samples of more than %d of the %d clusters; ranks "
                "exchange the gradients of their own, and ranks with one run the plain model",
                most,
                num_clusters,
            )
        self._most = most

    def _refuse_differences(self, rows: Tensor) -> None:
        for name, column in zip(self._SETTINGS, rows.T.tolist(), strict=True):
            if len(set(column)) > 1:
                found = ", ".join(f"{value:g} on rank {rank}" for rank, value in enumerate(column))
                raise ValueError(f"expected the same on every rank for {name}, found {found}")

    def weights(self, weights: Tensor) -> Tensor:
        """Return rank 0's weights: a weighting may draw random numbers."""
        return self.ranks.broadcast(weights.detach())

    def objective(
        self, objective: Tensor, weights: Tensor, losses: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a scalar whose slopes by the losses are those of rank 0, which may be random, and its weights.

        Its slopes by the weighting's own parameters are those of `objective`.
        """
        common = self.weights(weights)
        return objective + ((common - weights.detach()) / present.sum() * losses).sum(), common

    @contextmanager
    def adding_up(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Let the backward inside add to ``.grad`` the sum of what it adds on all ranks."""
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        sums = GradientSums(parameters, self.ranks, self._workspace, self._arrivals)
        try:
            with self.telling_before_gradients(sums), sums.taking():
                yield
            found = sums.finish()
        except BaseException:
            for parameter, old in zip(parameters, before, strict=True):
                parameter.grad = old
            raise
        for parameter, old, new in zip(parameters, before, found, strict=True):
            parameter.grad = new if old is None else old if new is None else old.add_(new)

    def only_cluster(self, counts: Sequence[int]) -> int | None:
        """Return the cluster that all samples of this rank belong to, if they do: see `ShardedJacobian`."""
        present = [k for k, count in enumerate(counts) if count]
        return present[0] if len(present) == 1 else None

    def reader(self, store: Store | Rows, factors: Tensor | None = None) -> Gradients:
        """Return what reads the sum of the rows that the ranks have, times each rank's own factors [K]."""
        rows = cast("Jacobian | Rows", store)
        return ShardedJacobian(rows, self.ranks, self._held, self._workspace, factors)
