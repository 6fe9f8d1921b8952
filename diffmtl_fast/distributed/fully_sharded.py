"""Fully sharded training (FSDP2): every process holds a shard of each parameter and samples of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._torch import sharded_gradients_summed, unsharded_parameters
from .ranks import Ranks
from .replicas import Replicas
from .sharded_jacobian import ShardedJacobian

if TYPE_CHECKING:
    from ..gradients.stores import Gradients, Jacobian


class FullySharded(Replicas):
    """Several processes with a fully sharded model, whose steps are the step of one process with all the samples.

    FSDP2 adds the gradients of all processes up, and leaves every one with its shard of the sum. The Gramians of
    shards can be added up, as those of replicas can't.

    Args:
        ranks: the processes.
        num_clusters: K.
        model: the model.
        parameters: its trainable parameters.

    Attributes:
        counts: of the last forward, the samples of every cluster on every rank, int64 [ranks, K] on the CPU.
        parameters: the trainable parameters.
        shards: the processes that hold the shards of one replica.
        replicated: whether there are several such replicas (HSDP).
        own_shards: which of all ranks the processes of `shards` are, in their order.

    Raises:
        ValueError: a parameter is not sharded, or not by `fully_shard` alone, or by processes other than `ranks`.
    """

    def __init__(
        self, ranks: Ranks, num_clusters: int, model: nn.Module, parameters: Sequence[nn.Parameter]
    ) -> None:
        super().__init__(ranks, num_clusters)
        mesh, dimension = _mesh(model, parameters)
        if mesh.size() != ranks.size:
            raise ValueError(
                f"process_group: expected the processes of the sharded model's mesh, {mesh.size()}, found "
                f"{ranks.size}"
            )
        self._model, self._number = model, num_clusters
        self.parameters = parameters
        self.shards = Ranks(mesh.get_group(dimension), ranks.device)
        self.replicated = mesh.ndim > 1
        places = dist.get_process_group_ranks(ranks.group)
        self.own_shards = [places.index(each) for each in dist.get_process_group_ranks(self.shards.group)]
        self.counts = torch.zeros(ranks.size, num_clusters, dtype=torch.int64)
        self._within_model = False
        self._members: list[list[int]] = []  # of every replica, its ranks
        if self.replicated:
            self._replicas = Ranks(mesh.get_group(1 - dimension), ranks.device)
            self._replicas.open_own_group()
            with torch.no_grad():
                self._replicas.broadcast_([local(parameter) for parameter in model.parameters()])
            rows = mesh.mesh.transpose(0, 1 - dimension).tolist()
            for each in dist.get_process_group_ranks(self._replicas.group):
                self._members.append([places.index(member) for row in rows if each in row for member in row])

    def meet(self, cluster: Tensor, by_cluster: bool, wish: int) -> int:
        """Exchange what this forward is about to do; the model's own collectives follow.

        Args:
            cluster: int64 [B], of this rank's samples.
            by_cluster: whether cluster gradients are formed.
            wish: any number, at least 0.

        Returns:
            The largest wish of all ranks.

        Raises:
            RuntimeError: a rank failed before it came here.
            ValueError: ranks differ in whether they form cluster gradients.
        """
        own = torch.zeros(self._count, dtype=torch.float64)
        own[: self._number] = torch.bincount(cluster, minlength=self._number)
        own[self._number], own[2 * self._number] = wish, by_cluster
        rows = self.ranks.share(own).cpu()
        self.counts = rows[:, : self._number].long()
        self._refuse_differences(rows[:, 2 * self._number : -1])
        self._within_model = True
        return int(rows[:, self._number].max())

    def only_cluster(self, counts: Sequence[int]) -> int | None:
        """Return None: the engine runs such batches, too."""
        return None

    @contextmanager
    def telling_before_losses(self) -> Iterator[None]:
        """Tell the other ranks of an error inside, unless they wait for something else in the model."""
        self._within_model, found = False, None
        with super().telling_before_losses():
            try:
                yield
            except Exception as error:
                if not self._within_model:
                    raise
                found = error
        if found is not None:
            raise found

    @contextmanager
    def telling_before_gradients(self, gradients: Any) -> Iterator[None]:
        """Tell nobody: the other ranks wait for something else in the model's backward."""
        yield

    @contextmanager
    def adding_up(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Let the backward inside add to ``.grad`` the shard of the sum of what it adds on all ranks.

        Args:
            parameters: not needed: a forward leaves whole ones in some modules.
        """
        parameters = self.parameters
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        with noting_use(self._model, parameters) as used, sharded_gradients_summed(self._model):
            yield
        reached = self.ranks.share(torch.tensor(used, dtype=torch.float64)).any(0).tolist()
        for parameter, old, there in zip(parameters, before, reached, strict=True):
            new = parameter.grad if there else None
            parameter.grad = new if old is None else old if new is None else old.add_(new)

    def _tell(self, num_clusters: int) -> None:
        """Leave it to the engine, which logs its rounds."""

    def reader(self, store: Any, factors: Tensor | None = None) -> Gradients:
        """Return what reads the shards of all ranks, in a `ShardStore`; factors are of `no_sync` alone."""
        return ShardReader(store, self)

    def sum_of_replicas(self, jacobian: Jacobian) -> ShardedJacobian:
        """Return what reads the sum of the Jacobians that the replicas have of this rank's shards."""
        there = self.counts > 0
        held = [there[members].any(0).nonzero().flatten().tolist() for members in self._members]
        return ShardedJacobian(jacobian, self._replicas, held, self._workspace)


class ShardStore:
    """The Jacobian of this rank's shards.

    Args:
        parameters: the trainable parameters, sharded.
        jacobian: of this rank's parts of those that have one.
        positions: of these among the parameters.

    Attributes:
        used: for every parameter, whether the last backward gave it a gradient on this rank.
        taken: for every parameter, whether its gradients have come here.
        of_replica: whether the rows are those of this rank's replica, and not the sums of all replicas.
    """

    keeps_graph = takes_offers = False

    def __init__(
        self, parameters: Sequence[nn.Parameter], jacobian: Jacobian | None, positions: Sequence[int]
    ) -> None:
        self.parameters, self.jacobian = parameters, jacobian
        self.positions = {position: index for index, position in enumerate(positions)}
        self.used = [False] * len(parameters)
        self.taken = [False] * len(parameters)
        self.of_replica = False

    def take(self, k: int) -> None:
        """Take the parameters' ``.grad`` away, as a row."""
        for position, parameter in enumerate(self.parameters):
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                self.add_row(position, k, local(grad))

    def add_row(self, position: int, k: int, gradient: Tensor) -> None:
        """Add this rank's part of a parameter's gradient for one cluster."""
        self.taken[position] = True
        index = self.positions.get(position)
        if index is not None and self.jacobian is not None:
            self.jacobian.add_row(index, k, gradient)


class ShardReader:
    """Reads the shards of all ranks, as a `Store` is read: Gramians are added up, updates stay where they are.

    Args:
        store: this rank's.
        ranks: all ranks.
    """

    def __init__(self, store: ShardStore, ranks: FullySharded) -> None:
        self._store, self._ranks = store, ranks
        self._reached: list[bool] = []
        self._rows: Gradients | None = None

    def gramian(self) -> Tensor:
        """Return J Jᵀ, float64 [K, K], at any scale."""
        store, ranks = self._store, self._ranks
        used = torch.tensor(store.used, dtype=torch.float64)
        self._reached = ranks.ranks.share(used).any(0).tolist()
        number = ranks.counts.shape[1]
        gramian = torch.zeros(number, number, dtype=torch.float64, device=ranks.ranks.device)
        if store.jacobian is not None:
            self._rows = ranks.sum_of_replicas(store.jacobian) if store.of_replica else store.jacobian
            gramian += self._rows.gramian()
        return self._add_up(gramian)

    def _add_up(self, value: Tensor) -> Tensor:
        """Return the sum over the shards of one replica, with the same bits on all ranks."""
        self._ranks.shards.add_([value])
        return self._ranks.ranks.broadcast(value) if self._ranks.replicated else value

    def drop(self, clusters: Tensor) -> None:
        """Set the gradients of some clusters, bool [K], to zero."""
        if self._rows is not None:
            self._rows.drop(clusters)

    def update(self, weights: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        """Add the shards of Σ_k w_k g_k to those of the parameters' ``.grad``; see `Store.update`."""
        store, square = self._store, None
        for parameter, reached in zip(store.parameters, self._reached, strict=True):
            if reached and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if store.jacobian is not None and self._rows is not None:
            for position, index in store.positions.items():
                grad = store.parameters[position].grad
                store.jacobian.parameters[index].grad = None if grad is None else local(grad)
            square = self._rows.update(weights, backward)
        return self._add_up(weights.new_zeros((), dtype=torch.float64) if square is None else square)


class ClusterReduceScatter:
    """Takes the place of FSDP2's reduce-scatter where ranks differ in the cluster that they differentiate.

    All-to-all moves no more than a reduce-scatter does. Every rank gets the others' gradients of its shard one by
    one, and adds up those of each cluster.

    Args:
        store: what takes them.

    Attributes:
        clusters: the cluster of every rank of this replica in the backward that runs; -1 for a rank without one.
    """

    def __init__(self, store: ShardStore, size: int) -> None:
        self._store, self._size = store, size
        self.clusters: Sequence[int] = ()
        self._rows: dict[int, Tensor] = {}
        self._offset = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for FSDP2's buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Exchange the gradients of one of FSDP2's groups; `take` is called for its parameters afterwards."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        wide = torch.promote_types(received.dtype, torch.float32)
        self._rows, self._offset = {}, 0
        for k, part in zip(self.clusters, received.view(self._size, -1), strict=True):
            if k in self._rows:
                self._rows[k] += part
            elif k >= 0:
                self._rows[k] = part.to(wide)
        output_tensor.zero_()

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take the rows of every parameter as soon as FSDP2 has come to it, in its order."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(position))
            for position, parameter in enumerate(self._store.parameters)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, position: int) -> Callable[[Tensor], None]:
        parameter: Any = self._store.parameters[position]
        shape = local(parameter).shape
        (dimension,) = [p.dim for p in parameter.placements if p.is_shard()]
        length = max(1, parameter.shape[dimension])
        padded = -(-parameter.shape[dimension] // self._size) * (parameter.numel() // length)

        def take(sharded: Tensor) -> None:
            sharded.grad = None
            self._store.taken[position] = True
            for k, row in self._rows.items():
                self._store.add_row(position, k, row[self._offset :][: shape.numel()].view(shape))
            self._offset += padded

        return take


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, which shares its memory; any other as it is."""
    part: Any = tensor.detach()
    return part.to_local() if hasattr(part, "to_local") else part


@contextmanager
def noting_use(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[bool]]:
    """Note which parameters get gradients in the backward inside; yields that for every one."""
    positions = {id(parameter): position for position, parameter in enumerate(parameters)}
    used = [False] * len(parameters)

    def note(position: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            used[position] = True

        return hook

    hooks = [
        leaf.register_post_accumulate_grad_hook(note(positions[id(parameter)]))
        for parameter, leaf in unsharded_parameters(model)
        if id(parameter) in positions
    ]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


def _mesh(model: nn.Module, parameters: Sequence[nn.Parameter]) -> tuple[Any, int]:
    """Return the mesh of processes that hold the parameters, and the dimension of it that shards them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mesh, dimension = None, 0
    parameter: Any
    for parameter in parameters:
        placements = getattr(parameter, "placements", None)
        if placements is None:
            raise ValueError(
                f"model: expected every trainable parameter sharded by fully_shard, found "
                f"'{names[id(parameter)]}' outside of it (ignored_params?)"
            )
        mesh = parameter.device_mesh if mesh is None else mesh
        sharded = [i for i, placement in enumerate(placements) if placement.is_shard()]
        replicated = [placement for placement in placements if placement.is_replicate()]
        if (
            len(sharded) != 1
            or len(placements) > 2
            or len(placements) != 1 + len(replicated)
            or parameter.device_mesh != mesh
        ):
            raise ValueError(
                f"model: expected parameters that fully_shard alone has sharded, all on one mesh, found "
                f"'{names[id(parameter)]}' with {placements} on {parameter.device_mesh}; tensor parallel is not "
                "supported"
            )
        dimension = sharded[0]
    return mesh, dimension
