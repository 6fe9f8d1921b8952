"""The engine of fully sharded models (FSDP2): a forward and a backward for each cluster of a rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from .._torch import fully_sharded_modules, sharded_compute_dtypes, sharded_gradients_summed
from ..distributed import Ranks
from ..distributed.fully_sharded import ClusterReduceScatter, FullySharded, ShardStore, local, noting_use
from .batch import BatchLayout
from .independence import agree, halves, interact, is_measured, revealing
from .loss_check import LossCheck
from .model_state import ModelState, evaluating
from .parameters import find_slots, grads_set_aside
from .step import Pass, Step
from .stores import Jacobian, Store
from .trees import copied, cut, flags, flatten, join, map_tensors

_logger = logging.getLogger("diffmtl_fast")
_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class _Parts:
    """What a forward in several rounds leaves for its backward.

    Attributes:
        joined: the leaves that stand for the outputs of all rounds, in the order of the batch.
        outputs: of every round, the outputs in the same order.
        spans: of every round, the rows of the sorted batch that it ran; None for a rank that only kept step.
        rounds: of every round, the cluster that every rank ran.
        inputs: arguments that are differentiated, with the leaves that stood for them in all rounds.
    """

    def __init__(self, rounds: list[list[int]]) -> None:
        self.rounds = rounds
        self.joined: list[Tensor] = []
        self.outputs: list[list[Tensor]] = []
        self.spans: list[tuple[int, int] | None] = []
        self.layout: BatchLayout | None = None
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def cut_off(self, ordered: _Arguments) -> _Arguments:
        """Put leaves into the place of arguments that are differentiated, whose graph all rounds would share."""

        def leaf_of(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            self.inputs.append((tensor, tensor.detach().requires_grad_()))
            return self.inputs[-1][1]

        found: _Arguments = map_tensors(leaf_of, ordered)
        return found

    def differentiate_inputs(self) -> None:
        """Continue the backward of all rounds in the graph that the arguments come from."""
        reached = [(given, leaf.grad) for given, leaf in self.inputs if leaf.grad is not None]
        if reached:
            torch.autograd.backward([given for given, _ in reached], [grad for _, grad in reached])


class FullyShardedEngine:
    """Forms the shards of the gradients of every cluster.

    A rank's samples are run in rounds, each a forward of the samples of one cluster, and each with a backward of
    its own, in whose reduce-scatter FSDP2 adds up what all ranks have of a cluster. All ranks go through the same
    number of rounds, since FSDP2's collectives are all ranks': one that has no samples in a round runs one of its
    samples without effect. Where no rank has samples of all clusters, ranks run other clusters in the same round,
    as many rounds as the most that one of them has; then an all-to-all takes the place of the reduce-scatter. If
    every rank has the samples of one cluster, that is one forward and one backward of the batch.

    Args:
        model: the model, after `fully_shard`.
        num_clusters: K.
        shared: names of keyword arguments (or positions of positional ones) that belong to the whole batch.
        dtype: of the stored gradients; default each parameter's own.

    Attributes:
        parameters: the trainable parameters, each once.
        dtype: of the stored gradients; None for each parameter's own.
    """

    def __init__(
        self,
        model: nn.Module,
        num_clusters: int,
        shared: Collection[str | int],
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.num_clusters, self.dtype = model, num_clusters, dtype
        self.shared = frozenset(shared)
        self._forget()

    def _forget(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self._key: list[Any] = []
        self._jacobian: Jacobian | None = None
        self._positions: list[int] = []  # of the parameters that this rank has a part of
        self._loss_check = LossCheck()
        self._checked: set[Any] = set()  # kinds of batches
        self._parts: dict[Pass, _Parts] = {}
        self._wish = 0
        self._told = False
        self.ranks: FullySharded | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to a process when copied or pickled."""
        return {name: self.__dict__[name] for name in ("model", "num_clusters", "shared", "dtype")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def meet_others(self, ranks: Ranks) -> FullySharded:
        """Return what these ranks, which train together, exchange in a step; see `FullySharded`."""
        self.begin(self.model)
        self.ranks = FullySharded(ranks, self.num_clusters, self.model, self.parameters)
        return self.ranks

    def begin(self, model: nn.Module) -> bool:
        """Start a forward: find the trainable parameters, and tell whether they have changed."""
        self.model = model
        for module in fully_sharded_modules(model):
            module.reshard()  # a forward without a backward leaves whole parameters in the shards' places
        _, self.parameters = find_slots(model)
        key = [(id(p), p.shape, p.dtype, p.device) for p in self.parameters]
        changed = key != self._key
        if changed:
            self._key, self._jacobian = key, None
            self._loss_check = LossCheck()
            self._checked.clear()
        return changed

    # The forward.

    def meet(self, cluster: Tensor, by_cluster: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Exchange the counts of the clusters with the other ranks, before a forward of any kind."""
        assert self.ranks is not None
        if not by_cluster:
            self.begin(self.model)
        self.ranks.parameters = self.parameters
        wish = 0
        if by_cluster and self._kind(len(cluster), args, kwargs) not in self._checked:
            wish = 1 + len(list(halves(len(cluster))))
        self._wish = self.ranks.meet(cluster, by_cluster, wish)

    def _kind(self, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shapes = [
            tuple(leaf.shape[1:] if leaf.dim() and leaf.shape[0] == size else leaf.shape)
            for leaf in flatten((args, kwargs))[0]
            if isinstance(leaf, Tensor)
        ]
        return (tuple(m.training for m in self.model.modules()), flags(args, kwargs), *shapes)

    def forward(self, step: Step, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model; the order of the samples in arguments and outputs is the batch's own.

        Raises:
            ValueError: slices of the batch do not give what the whole batch gives, on any rank.
        """
        rounds = self._plan()
        self._tell(rounds)
        self._parts = {each: parts for each, parts in self._parts.items() if each.step is step}
        step.begin_pass(layout.clusters)
        ordered = layout.sort(args, kwargs, self.shared)
        if self._wish and len(rounds) > 1:
            self._check(layout, (args, kwargs), ordered, rounds)
            self._checked.add(self._kind(layout.batch_size, args, kwargs))
        parts = _Parts(rounds)
        output = self._join(step, parts, layout, self._run(parts, layout, parts.cut_off(ordered)))
        self._parts[step.passes[-1]] = parts
        step.passes[-1].outputs = [
            leaf for leaf in flatten(output)[0] if is_measured(leaf) and leaf.requires_grad
        ]
        return output

    def _plan(self) -> list[list[int]]:
        """Return the cluster that every rank runs in each round, -1 for none."""
        assert self.ranks is not None
        there = self.ranks.counts > 0
        lists = [row.nonzero().flatten().tolist() for row in there]
        present = there.any(0).nonzero().flatten().tolist()
        most = max(len(each) for each in lists)
        if most == len(present):
            return [[k] * len(lists) for k in present]
        return [[each[i] if i < len(each) else -1 for each in lists] for i in range(most)]

    def _run(self, parts: _Parts, layout: BatchLayout, ordered: _Arguments) -> list[Any]:
        """Run the rounds; return the outputs of those with samples of this rank."""
        assert self.ranks is not None
        (args, kwargs), size, outputs = ordered, layout.batch_size, []
        bounds = layout.clusters.bounds
        parts.layout = layout
        for clusters in parts.rounds:
            k = clusters[self.ranks.ranks.rank]
            begin, end = (bounds[k], bounds[k + 1]) if k >= 0 else (0, 0)
            absent = begin == end
            if absent:
                begin, end = 0, 1
            part_args = tuple(a if i in self.shared else cut(a, size, begin, end) for i, a in enumerate(args))
            part_kwargs = {n: a if n in self.shared else cut(a, size, begin, end) for n, a in kwargs.items()}
            output = self.model(*part_args, **part_kwargs)
            parts.outputs.append([leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)])
            parts.spans.append(None if absent else (begin, end))
            if not absent:
                outputs.append(output)
        return outputs

    def _join(self, step: Step, parts: _Parts, layout: BatchLayout, outputs: list[Any]) -> Any:
        """Return the rounds' outputs as one, from which a backward comes to leaves and no further.

        FSDP2 gathers parameters as soon as anything is differentiated by an output of the model, on all ranks.
        """
        sizes = [span[1] - span[0] for span in parts.spans if span is not None]
        trained = [leaf.requires_grad for leaf in parts.outputs[0]]
        output = layout.unsort(join([map_tensors(Tensor.detach, each) for each in outputs], sizes))
        leaves, rebuild, _ = flatten(output)
        given, which = [], iter(trained)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and next(which):
                leaf.requires_grad_().register_post_accumulate_grad_hook(_refuse_other_backwards(step))
                parts.joined.append(leaf)
                given.append(leaf.view_as(leaf))
            else:
                given.append(leaf)
        parts.outputs = [[o for o, t in zip(each, trained, strict=True) if t] for each in parts.outputs]
        return rebuild(given)

    # The check.

    def _check(
        self, layout: BatchLayout, given: _Arguments, ordered: _Arguments, rounds: list[list[int]]
    ) -> None:
        """Refuse a model whose samples have an effect on each other, or that rounds would change.

        All ranks run the same number of forwards, whatever they find in them.

        Raises:
            ValueError: on the rank that found it; RuntimeError on the others.
        """
        assert self.ranks is not None
        began, problem = time.perf_counter(), ""
        with self._revealed(), torch.no_grad():
            state, runs = ModelState(self.model), 0

            def run(args: Any, kwargs: Any) -> Any:
                nonlocal runs
                runs += 1
                args, kwargs = map_tensors(copied, (args, kwargs))
                return map_tensors(Tensor.detach, self.model(*args, **kwargs))

            run(*given)  # the first forward may fill buffers
            warm = ModelState(self.model)
            try:
                if interact(run, *given, layout.batch_size, warm, shared=self.shared):
                    problem = (
                        "each sample's output to depend on that sample's rows of the arguments alone, found that "
                        "others' rows change it; samples are mixed, or an argument that belongs to the whole "
                        "batch (name it in shared=) has as many rows as there are samples"
                    )
            except ValueError as error:
                problem = str(error).removeprefix("model: expected ")
            for _ in range(runs, 2 + self._wish):
                run(*given)
            if changed := warm.changed():
                problem = problem or (
                    f"buffers that a forward leaves as they are, found '{changed[0].name}' updated; rounds would "
                    "update it once per cluster"
                )
            with evaluating(self.model):
                warm.restore()
                whole = run(*given)
                warm.restore()
                parts = _Parts(rounds)
                outputs = self._run(parts, layout, map_tensors(copied, ordered))
            sizes = [span[1] - span[0] for span in parts.spans if span is not None]
            state.restore()
        with self.ranks.ranks.telling(1):
            if not problem and not agree(whole, layout.unsort(join(outputs, sizes)), self._eps):
                problem = (
                    "each sample's output to depend on that sample alone, found that slices of the batch give "
                    "another output than the whole batch"
                )
            if problem:
                raise ValueError(f"model: expected {problem}")
        self.ranks.ranks.share(torch.zeros(1))
        _logger.info(
            "ClusteredMTL: checked the model on a batch of %d samples in %.1f s",
            layout.batch_size,
            time.perf_counter() - began,
        )

    @property
    def _eps(self) -> float:
        """The relative rounding of the lowest precision that the model is known to use."""
        device = self.parameters[0].device.type
        dtypes = {p.dtype for p in self.parameters}
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        dtypes |= sharded_compute_dtypes(self.model)
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    @contextmanager
    def _revealed(self) -> Iterator[None]:
        """Let shards that are all zero have other values for a while; they would hide what is before them."""
        with torch.no_grad():
            shards = [part for p in self.parameters if (part := local(p)).numel() and not bool(part.any())]
            before = [shard.clone() for shard in shards]
            for shard in shards:
                shard.copy_(revealing(shard))
        try:
            yield
        finally:
            with torch.no_grad():
                for shard, value in zip(shards, before, strict=True):
                    shard.copy_(value)
            for module in fully_sharded_modules(self.model):
                module.reshard()

    # The backward.

    def check_losses(self, step: Step, losses: Tensor) -> None:
        """Refuse losses that depend on other samples' outputs; see `Engine.check_losses`."""
        step.refuse_other_clusters()
        self._loss_check(losses, step.take_outputs())

    def store(self, step: Step) -> ShardStore:
        """Return an empty store for a step's gradients."""
        if self._jacobian is None:
            parts = [local(p) for p in self.parameters]
            self._positions = [i for i, part in enumerate(parts) if part.numel()]
            shards = [nn.Parameter(parts[i]) for i in self._positions]
            self._jacobian = Jacobian(shards, self.num_clusters, self.dtype) if shards else None
        if self._jacobian is not None:
            self._jacobian.clear()
        return ShardStore(self.parameters, self._jacobian, self._positions)

    def collect(self, step: Step, objective: Tensor, store: ShardStore) -> None:
        """Run the backward of a scalar; the shards of the parameters' gradients go to `store`.

        Args:
            step: whose forwards the scalar comes from.
            objective: what to differentiate: a sum over samples of the step's forwards.
            store: what takes the gradients.

        Raises:
            RuntimeError: FSDP2 did not add gradients up.
        """
        assert self.ranks is not None
        parts = [self._parts[each] for each in step.passes]
        self._parts = {}
        rounds = parts[0].rounds
        if any(each.rounds != rounds for each in parts):
            raise ValueError(
                "cluster: expected the same clusters in all forwards of a fully sharded model that share a "
                "backward, found others"
            )
        uniform = all(len(set(clusters)) == 1 for clusters in rounds)
        scatter = None if uniform else ClusterReduceScatter(store, self.ranks.shards.size)
        store.of_replica = scatter is not None and self.ranks.replicated
        with (
            step.collecting(cast("Store", store)),  # nothing asks it for more than whether it is there
            grads_set_aside(self.parameters),
            noting_use(self.model, self.parameters) as used,
            sharded_gradients_summed(self.model, scatter),
            nullcontext() if scatter is None else scatter.taking(),
        ):
            for clusters, backward in zip(rounds, _backwards(parts, objective), strict=True):
                if scatter is not None:
                    scatter.clusters = [clusters[rank] for rank in self.ranks.own_shards]
                backward()
                if scatter is None:
                    store.take(clusters[0])
            for each in parts:
                each.differentiate_inputs()
        store.used = used
        if any(there and not taken for there, taken in zip(used, store.taken, strict=True)):
            raise RuntimeError(
                "model: expected FSDP2 to reduce gradients in every backward, found that it does not; "
                "ClusteredMTL accumulates without set_requires_gradient_sync(False)"
            )

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Do nothing: modules keep their parameters."""
        yield

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that the parameters' gradients end at."""
        return list(self.parameters)

    def release(self) -> None:
        """Give the Jacobian's memory back."""
        self._jacobian = None

    def _tell(self, rounds: list[list[int]]) -> None:
        if not self._told:
            _logger.info(
                "ClusteredMTL: fully sharded engine for K = %d and %d parameters: %d forward and backward passes "
                "for the clusters of this batch",
                self.num_clusters,
                sum(p.numel() for p in self.parameters),
                len(rounds),
            )
            self._told = True


def _backwards(parts: list[_Parts], objective: Tensor) -> Iterator[Callable[[], None]]:
    """Yield what differentiates each round of a step's forwards."""
    objective.backward()
    slopes = []
    for each in parts:
        assert each.layout is not None
        slopes.append(
            [None if leaf.grad is None else _sorted(leaf.grad, each.layout) for leaf in each.joined]
        )
    for number in range(len(parts[0].rounds)):
        roots: list[Tensor] = []
        given: list[Tensor] = []
        for each, whole in zip(parts, slopes, strict=True):
            span = each.spans[number]
            for output, slope in zip(each.outputs[number], whole, strict=True):
                if slope is not None:
                    roots.append(output)
                    given.append(torch.zeros_like(output) if span is None else slope[span[0] : span[1]])

        def backward(roots: list[Tensor] = roots, given: list[Tensor] = given) -> None:
            torch.autograd.backward(roots, given)

        yield backward


def _sorted(slope: Tensor, layout: BatchLayout) -> Tensor:
    ((ordered,), _) = layout.sort((slope,), {}, ())
    return ordered


def _refuse_other_backwards(step: Step) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        if step.store is None:
            raise RuntimeError(
                "expected mtl.backward(loss) after a forward with cluster=... of a fully sharded model, found "
                "another backward (loss.backward()?), which would not come to its parameters"
            )

    return hook
