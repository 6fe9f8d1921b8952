"""The choice of engine, and what both engines share: the parameters, the order of the batch, the stores."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .agreement import agree, evaluating
from .grouped import CannotGroup, GroupedEngine
from .jacobian import Jacobian
from .layout import BatchLayout, flatten
from .lean import LeanGramian
from .parameters import Slot, find_slots, fingerprint, grad_versions, installed, module_name
from .receiver import Receiver, Store
from .sliced import Aliases, run_slices

_logger = logging.getLogger("diffmtl_fast")

EngineName = Literal["auto", "grouped", "sliced"]


class Engine:
    """Forms the gradients of every cluster in one forward and one backward.

    Args:
        model: the model; its trainable parameters are those that require a gradient at the time of a forward.
        num_clusters: K.
        name: "grouped", "sliced", or "auto": grouped wherever it is exact, which is checked; slices for compiled
            models, whose operations Python does not see, and where the check fails.
        shared: names of keyword arguments (or positions of positional ones) that belong to the whole batch.
        dtype: of the stored gradients; default each parameter's own.

    Attributes:
        parameters: the trainable parameters, each once.
        receiver: where gradients go.
    """

    def __init__(
        self,
        model: nn.Module,
        num_clusters: int,
        name: EngineName,
        shared: Collection[str | int],
        dtype: torch.dtype | None,
    ) -> None:
        self._model = model
        self._num_clusters = num_clusters
        self._name = name
        self._shared = frozenset(shared)
        self._dtype = dtype
        self._forget()

    def _forget(self) -> None:
        self._key: list[tuple[Any, ...]] = []
        self._slots: list[Slot] = []
        self.parameters: list[nn.Parameter] = []
        self.receiver = Receiver()
        self._grouped: GroupedEngine | None = None
        self._aliases: list[Aliases] = []
        self._jacobian: Jacobian | None = None
        self._checked: set[Any] = set()
        self._told: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Jacobian and the stand-ins behind when copied or pickled: `begin` makes new ones."""
        return {
            name: self.__dict__[name] for name in ("_model", "_num_clusters", "_name", "_shared", "_dtype")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def begin(self) -> None:
        """Start a step: find the trainable parameters, and renew the stand-ins if they have changed.

        Raises:
            ValueError: see `find_slots`.
        """
        self._slots, self.parameters = find_slots(self._model)
        key = fingerprint(self.parameters)
        if key != self._key:
            self._key, self._jacobian, self.receiver = key, None, Receiver()
            self._aliases = [Aliases(self.parameters, k, self.receiver) for k in range(self._num_clusters)]
            self._grouped = self._make_grouped()
        self.receiver.bypassed = False
        if self._grouped is not None:
            self._grouped.begin()

    def _make_grouped(self) -> GroupedEngine | None:
        if self._name == "sliced":
            self._tell("sliced", "as asked for")
            return None
        compiled = _compiled_module(self._model)
        if compiled is not None and self._name == "grouped":
            raise ValueError(
                f"engine='grouped': expected a model that is not compiled, found '{compiled}' compiled; use "
                "engine='auto' or 'sliced'"
            )
        if compiled is not None:
            self._tell("sliced", f"'{compiled}' is compiled")
            return None
        return GroupedEngine(self._model, self._slots, self.parameters, self._num_clusters, self.receiver)

    def forward(self, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model; the order of the samples in arguments and outputs is the batch's own.

        Raises:
            ValueError: slices of the batch do not give what the whole batch gives, or the model's outputs are not
                batches.
            RuntimeError: engine="grouped", and the model can't be grouped.
        """
        args, kwargs = layout.sort(args, kwargs, self._shared)
        if self._grouped is not None:
            try:
                output = layout.unsort(self._grouped.forward(layout, args, kwargs))
                self._tell("grouped", self._exceptions())
                return output
            except CannotGroup as error:
                if self._name == "grouped":
                    raise RuntimeError(f"engine='grouped': {error}") from error
                self._grouped = None
                self._tell("sliced", str(error))
        self._check_slices(layout, args, kwargs)
        return layout.unsort(self._run_slices(layout, args, kwargs, self._aliases))

    def _run_slices(self, layout: BatchLayout, args: Any, kwargs: Any, stand_ins: Any) -> Any:
        return run_slices(self._model, self._slots, stand_ins, layout, args, kwargs, shared=self._shared)

    def _check_slices(self, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a model whose samples have an effect on each other, once for every shape of a sample."""
        shapes = [
            tuple(leaf.shape[1:] if leaf.dim() and leaf.shape[0] == layout.batch_size else leaf.shape)
            for leaf in flatten((args, kwargs))[0]
            if isinstance(leaf, Tensor)
        ]
        key = (layout.batch_size == 1, *shapes)
        if key in self._checked or layout.batch_size == 1:
            return
        device = self.parameters[0].device
        rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
        buffers = [(b, b.clone()) for b in self._model.buffers()]
        # Of what may be compiled the code as written is run; without dynamo, slow to import, nothing is compiled.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with rng, eager, torch.no_grad(), evaluating(self._model), installed(self._slots, self.parameters):
            whole = self._model(*args, **kwargs)
            parts = self._run_slices(layout, args, kwargs, [self.parameters] * self._num_clusters)
        for buffer, value in buffers:
            buffer.copy_(value)
        if not agree(whole, parts):
            raise ValueError(
                "model: expected each sample's output to depend on that sample alone, found that slices of the "
                "batch give another output than the whole batch"
            )
        self._checked.add(key)

    def collect(self, objective: Tensor, store: Store, *, again: bool = False) -> None:
        """Run the backward of a scalar; the parameters' gradients go to `store`, cluster by cluster.

        Args:
            objective: what to differentiate: a sum over samples of the forwards since `begin`.
            store: what takes the gradients.
            again: keep the graph, for another backward.

        Raises:
            RuntimeError: gradients reached the parameters' ``.grad`` instead.
        """
        before = grad_versions(self.parameters)
        with self.receiver.collecting(store), self.during_backward():
            if again:
                objective.backward(inputs=self.leaves, retain_graph=True)
            else:
                objective.backward()
        if grad_versions(self.parameters) != before:
            raise RuntimeError(
                "model: expected gradients cluster by cluster alone, found some in the parameters' .grad; in "
                "slices a reentrant checkpoint recomputes outside its slice (pass use_reentrant=False to "
                "checkpoint), and a call without cluster= does not take part in the weighting"
            )

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Keep the stand-ins in place where checkpoints are recomputed."""
        if self._grouped is None:
            yield
        else:
            with self._grouped.recomputing():
                yield

    @property
    def jacobian(self) -> Jacobian:
        """The Jacobian of this step."""
        if self._jacobian is None:
            self._jacobian = Jacobian(self.parameters, self._num_clusters, self._dtype)
        return self._jacobian

    def lean_gramian(self) -> LeanGramian:
        """Return a fresh store that keeps no Jacobian.

        Raises:
            ValueError: the model runs in slices as a whole.
        """
        if self._grouped is None:
            raise ValueError(f"memory='lean': expected the grouped engine, found slices: {self._told}")
        defers = not self._grouped.recomputes
        return LeanGramian(self.parameters, self._num_clusters, self._grouped.uses, defers, self._dtype)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that the parameters' gradients end at."""
        own = [leaf for aliases in self._aliases for leaf in aliases.leaves]
        return own if self._grouped is None else [*own, *self._grouped.leaves]

    def _exceptions(self) -> str:
        assert self._grouped is not None
        named = [
            f"{module_name(self._model, m)} in slices ({why})" for m, why in self._grouped.sliced.items()
        ]
        return "; ".join(named) or "every parameter has a rule"

    def _tell(self, engine: str, why: str) -> None:
        """Log what was chosen and why, once until it changes."""
        message = f"{engine}: {why}"
        if message != self._told:
            count = sum(p.numel() for p in self.parameters)
            _logger.info(
                "ClusteredMTL: %s engine for K = %d and %d parameters: %s",
                engine,
                self._num_clusters,
                count,
                why,
            )
            self._told = message


def _compiled_module(model: nn.Module) -> str | None:
    """Return the name of a compiled module, if there is one."""
    dynamo = sys.modules.get("torch._dynamo")  # takes seconds to import, and nothing is compiled without it
    for name, module in model.named_modules():
        wrapped = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        if wrapped or module._compiled_call_impl is not None:
            return name or type(module).__name__
    return None
