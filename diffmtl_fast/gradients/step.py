"""One training step: made by a forward, consumed by a backward."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .batch import Clusters
from .measuring import Repeat
from .stores import Store
from .trees import flatten


class Pass:
    """One forward of a step. The nodes of its graph hold it.

    Args:
        step: the step.
        clusters: of the sorted batch.
        number: which of the step's forwards it is, from 0.

    Attributes:
        cluster: int64 [B], as it was given.
        outputs: that a loss may be differentiated by, until the loss is checked.
        used: the parameters that took part in operations, by position: one entry for every time.
        recomputes: whether activations are packed away, to be recomputed or fetched in backward.
        repeat: what forms the cluster gradients of a plain forward afterwards; None where its graph does.
    """

    def __init__(self, step: Step, clusters: Clusters, number: int) -> None:
        self.step, self.clusters, self.number = step, clusters, number
        self.cluster: Tensor | None = None
        self.outputs: list[Tensor] = []
        self.used: list[tuple[int, ...]] = []
        self.recomputes = False
        self.repeat: Repeat | None = None


class Step:
    """What a forward leaves for its backward; several forwards may share one.

    Args:
        by_cluster: whether the graph can tell the clusters apart; otherwise it is the plain model's.
        only: the cluster of all samples, whose gradient a backward of the plain model forms.
        measured: whether the graph is the plain model's, and the cluster gradients are formed beside it.

    Attributes:
        cluster: int64 [B], of the last forward; None until one has succeeded.
        passes: the forwards whose clusters can be told apart.
        store: what takes per-cluster gradients now; None in any backward but `ClusteredMTL.backward`'s own, where
            the graph behaves like the plain model's.
        bypassed: whether such another backward has come by.
        thread: the thread that it belongs to.
    """

    def __init__(self, by_cluster: bool, only: int | None = None, measured: bool = False) -> None:
        self.by_cluster, self.only, self.measured = by_cluster, only, measured
        self.cluster: Tensor | None = None
        self.passes: list[Pass] = []
        self.store: Store | None = None
        self.bypassed = False
        self.thread = threading.get_ident()

    def begin_pass(self, clusters: Clusters) -> Pass:
        """Start a forward whose clusters can be told apart."""
        self.passes.append(Pass(self, clusters, len(self.passes)))
        return self.passes[-1]

    def watch(self, output: Any) -> Any:
        """Notice a backward other than `ClusteredMTL.backward` that comes by a plain forward's output.

        Only what that one does not differentiate is still watched when the next forward comes.
        """
        leaves = flatten(output)[0]
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad), None)
        if first is not None:
            first.register_hook(self._bypass)
        return output

    def _bypass(self, gradient: Tensor) -> None:
        self.bypassed = True

    def keep_passes_of(self, loss: Tensor) -> None:
        """Forget the forwards that the loss does not come from, such as one whose loss was NaN and skipped."""
        if len(self.passes) < 2:
            return
        reached = set(nodes(loss, set()))
        self.passes = [p for p in self.passes if any(output.grad_fn in reached for output in p.outputs)]

    def refuse_other_clusters(self) -> None:
        """Refuse forwards of one loss whose samples are of different clusters.

        Raises:
            ValueError: there are such.
        """
        clusters = [p.cluster for p in self.passes if p.cluster is not None]
        for other in clusters[1:]:
            # Comparing waits for an accelerator: where forwards that share a backward have tensors of their own.
            if other is not clusters[0] and not torch.equal(other, clusters[0]):
                raise ValueError(
                    "cluster: expected the same clusters in all forwards that share a backward, found others; "
                    "pass those of the losses to mtl.backward(loss, cluster)"
                )

    def take_outputs(self) -> list[Tensor]:
        """Return the outputs of the forwards, and keep them no longer."""
        taken = [output for each in self.passes for output in each.outputs]
        for each in self.passes:
            each.outputs = []
        return taken

    @property
    def uses(self) -> Counter[int]:
        """How many operations each parameter took part in."""
        return Counter(position for each in self.passes for used in each.used for position in used)

    @property
    def recomputes(self) -> bool:
        """Whether activations are packed away, to be recomputed or fetched in backward."""
        return any(each.recomputes for each in self.passes)

    @property
    def layouts(self) -> Collection[tuple[int, ...]]:
        """The bounds of the clusters in the step's forwards, each once."""
        return {each.clusters.bounds for each in self.passes}

    @contextmanager
    def collecting(self, store: Store) -> Iterator[None]:
        """Send the gradients of the backward inside to a store."""
        self.store = store
        try:
            yield
        finally:
            self.store = None


def nodes(tensor: Tensor, visited: set[Any]) -> Iterator[torch.autograd.graph.Node]:
    """Yield the nodes of a tensor's graph that are not in `visited`, and add them to it."""
    found = [tensor.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        found.extend(following for following, _ in node.next_functions)
