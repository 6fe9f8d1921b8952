"""The choice of engine, and what both engines share: the parameters, the order of the batch, the stores."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .agreement import State, agree, evaluating, halves, interact, is_measured, revealing
from .grouped import CannotGroup, GroupedEngine
from .jacobian import Jacobian
from .layout import BatchLayout, flags, flatten
from .lean import LeanGramian
from .parameters import Slot, find_slots, fingerprint, grad_versions, installed, module_name
from .receiver import Receiver, Store
from .sliced import Aliases, run_slices

_logger = logging.getLogger("diffmtl_fast")

EngineName = Literal["auto", "grouped", "sliced"]
_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class Engine:
    """Forms the gradients of every cluster in one forward and one backward.

    Args:
        model: the model; its trainable parameters are those that require a gradient at the time of a forward.
        num_clusters: K.
        name: "grouped", "sliced", or "auto": grouped wherever it is exact, which is checked; slices for compiled
            models, whose operations Python does not see, and where the check fails.
        shared: names of keyword arguments (or positions of positional ones) that belong to the whole batch.
        dtype: of the stored gradients; default each parameter's own.

    Raises:
        ValueError: an unknown name.

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
        if name not in get_args(EngineName):
            raise ValueError(f"engine: expected one of {list(get_args(EngineName))}, found {name!r}")
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
        self._outputs: list[Tensor] = []  # of the last forward
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
            self._checked.clear()
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
            RuntimeError: engine="grouped", and the model can't be grouped; or in `parametrize.cached`.
        """
        if parametrize._cache_enabled:
            raise RuntimeError(
                "expected a forward outside of torch.nn.utils.parametrize.cached(), found it inside, where "
                "clusters would share the tensors that gradients are told apart by"
            )
        given, (args, kwargs) = (args, kwargs), layout.sort(args, kwargs, self._shared)
        if self._grouped is not None:
            if layout.order is not None:
                self._check_order(layout, given, (args, kwargs))
            try:
                output = layout.unsort(self._grouped.forward(layout, args, kwargs))
                self._tell("grouped", self._exceptions())
                return self._remember(output)
            except CannotGroup as error:
                if self._name == "grouped":
                    raise RuntimeError(f"engine='grouped': {error}") from error
                self._grouped = None
                self._tell("sliced", str(error))
        self._check_slices(layout, given, (args, kwargs))
        return self._remember(layout.unsort(self._run_slices(layout, args, kwargs, self._aliases)))

    def _run_slices(self, layout: BatchLayout, args: Any, kwargs: Any, stand_ins: Any) -> Any:
        return run_slices(self._model, self._slots, stand_ins, layout, args, kwargs, shared=self._shared)

    # Checks, once for every shape of a sample.

    def _check_order(self, layout: BatchLayout, given: _Arguments, ordered: _Arguments) -> None:
        """Refuse arguments that are not the samples' although they look it, where the samples are put in order."""
        key = self._shapes("order", layout, given)
        if key in self._checked or layout.batch_size == 1:
            return
        with self._checking(given) as state:
            self._refuse_interaction(layout, given, state)
            with evaluating(self._model):
                whole, parts = self._call(*given), layout.unsort(self._call(*ordered))
        if not agree(whole, parts):
            raise ValueError(
                "model: expected arguments with a row for every sample, found another output when the samples are "
                "put in the order of their clusters; pass lists as tensors, or sort the batch by cluster"
            )
        self._checked.add(key)

    def _check_slices(self, layout: BatchLayout, given: _Arguments, ordered: _Arguments) -> None:
        """Refuse a model whose samples have an effect on each other, or that slices would change."""
        key = self._shapes("slices", layout, given)
        if key in self._checked or layout.batch_size == 1:
            return
        with self._checking(given) as state:
            self._refuse_interaction(layout, given, state)
            if changed := state.changed():
                where = module_name(self._model, changed[0].module)
                raise ValueError(
                    f"model: expected buffers that a forward leaves as they are, found '{changed[0].name}' of "
                    f"'{where}' updated; slices would update it once per cluster"
                )
            with evaluating(self._model):
                whole = self._call(*given)
                same: Any = [[revealing(p) for p in self.parameters]] * self._num_clusters
                parts = layout.unsort(self._run_slices(layout, *ordered, same))
        if not agree(whole, parts):
            raise ValueError(
                "model: expected each sample's output to depend on that sample alone, found that slices of the "
                "batch give another output than the whole batch"
            )
        self._checked.add(key)

    def _shapes(self, what: str, layout: BatchLayout, given: _Arguments) -> tuple[Any, ...]:
        """Name what a check holds for."""
        shapes = [
            tuple(leaf.shape[1:] if leaf.dim() and leaf.shape[0] == layout.batch_size else leaf.shape)
            for leaf in flatten(given)[0]
            if isinstance(leaf, Tensor)
        ]
        return (what, tuple(module.training for module in self._model.modules()), flags(*given), *shapes)

    @contextmanager
    def _checking(self, given: _Arguments) -> Iterator[State]:
        """Run the model without consequences; yields its state after a first forward, which may fill buffers."""
        before = State(self._model)
        # Of what may be compiled the code as written is run; without dynamo, slow to import, nothing is compiled.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        try:
            values = [revealing(p) for p in self.parameters]
            with warnings.catch_warnings(), eager, torch.no_grad(), installed(self._slots, values):
                warnings.simplefilter("ignore")  # the real forward will warn, and not of missing gradients
                self._call(*given)
                yield State(self._model)
        finally:
            before.restore()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._model(*args, **kwargs)

    def _refuse_interaction(self, layout: BatchLayout, given: _Arguments, state: State) -> None:
        if interact(self._call, *given, layout.batch_size, state, shared=self._shared):
            raise ValueError(
                "model: expected each sample's output to depend on that sample's rows of the arguments alone, "
                "found that others' rows change it; samples are mixed, or an argument that belongs to the whole "
                "batch (name it in shared=) has as many rows as there are samples"
            )

    def _remember(self, output: Any) -> Any:
        leaves = flatten(output)[0]
        self._outputs = [leaf for leaf in leaves if is_measured(leaf) and leaf.requires_grad]
        return output

    def check_losses(self, losses: Tensor) -> None:
        """Refuse losses that depend on other samples' outputs, once for every kind of them.

        Args:
            losses: [B], computed from the outputs of the last forward.

        Raises:
            ValueError: a loss depends on the output of another sample.
        """
        size, outputs, self._outputs = losses.shape[0], self._outputs, []
        outputs = [output for output in outputs if output.dim() and output.shape[0] == size]
        key = ("losses", losses.grad_fn and losses.grad_fn.name(), *(output.shape[1:] for output in outputs))
        if key in self._checked or not outputs or size == 1:
            return
        for chosen in halves(size):
            chosen = chosen.to(losses.device)
            try:
                slopes = torch.autograd.grad(
                    losses, outputs, chosen.to(losses.dtype), retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:  # losses that can be differentiated only once
                _logger.warning(
                    "ClusteredMTL: could not check that each loss depends on its own sample alone: %s", error
                )
                break
            for slope in slopes:
                # NaN is 0 times an overflow.
                if slope is not None and bool(slope.reshape(size, -1)[~chosen].nan_to_num(0).any()):
                    raise ValueError(
                        "loss: expected the loss of each sample to depend on that sample's output alone, found "
                        "that others' outputs change it (a mean over the batch? outputs with another dimension 0?)"
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
        after = grad_versions(self.parameters)
        if after != before:
            reached = {
                id(p) for p, old, new in zip(self.parameters, before, after, strict=True) if old != new
            }
            names = [name for name, p in self._model.named_parameters() if id(p) in reached]
            raise RuntimeError(
                f"model: expected gradients cluster by cluster alone, found some in the .grad of {names}; in "
                "slices a reentrant checkpoint recomputes outside its slice (pass use_reentrant=False to "
                "checkpoint), a call without cluster= does not take part in the weighting, and parameters must be "
                "used as attributes of their modules"
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
        grouped = self._grouped
        by_row, defers = grouped.positions_in_slices(), not grouped.recomputes
        return LeanGramian(self.parameters, self._num_clusters, grouped.uses, by_row, defers, self._dtype)

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
