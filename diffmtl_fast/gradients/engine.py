"""The choice of engine, and what both engines share: the parameters, the order of the batch, the stores."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from .._torch import compiled_modules, modules_of, parametrize_cached
from ..distributed import Ranks, Replicas
from .batch import BatchLayout
from .compiled import CompiledEngine
from .grouped import CannotGroup, GroupedEngine
from .host_bound import HostBound
from .independence import is_measured
from .loss_check import LossCheck
from .model_check import ModelCheck
from .parameters import Slot, find_slots, fingerprint, grad_versions, installed, parameter_names
from .sliced import Aliases, run_slices
from .step import Step
from .stores import Jacobian, LeanGramian, Store
from .trees import flatten

_logger = logging.getLogger("diffmtl_fast")

_ADVICE = (
    "the GPU was always done with the backward before the host had launched the Gramian: steps take as long as "
    "the host takes to launch them. CUDA graphs launch a model at once: pass ClusteredMTL(..., "
    'compile={"mode": "reduce-overhead"}), or use larger batches'
)

EngineName = Literal["auto", "grouped", "sliced"]
Memory = Literal["full", "lean"]
_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class Engine:
    """Forms the gradients of every cluster in one forward and one backward.

    Args:
        model: the model; its trainable parameters are those that require a gradient at the time of a forward.
        num_clusters: K.
        name: "grouped", "sliced", or "auto": grouped wherever it is exact, which is checked, and slices where the
            check fails. Compiled models are grouped by an engine of their own.
        memory: "full" or "lean", see `ClusteredMTL`.
        shared: names of keyword arguments (or positions of positional ones) that belong to the whole batch.
        dtype: of the stored gradients; default each parameter's own.

    Raises:
        ValueError: an unknown name.

    Attributes:
        model: the model.
        parameters: the trainable parameters, each once.
        names: their names.
        training: of every module, whether it is in training mode.
        slots: where the model's modules look them up.
        grouped: the grouped engine, where the model is run by it.
        compiled: the engine of compiled models, where the model is run by it.
        dtype: of the stored gradients; None for each parameter's own.
        jacobian_in_use: whether the Jacobian holds gradients that a check of the model must not write over.
    """

    def __init__(
        self,
        model: nn.Module,
        num_clusters: int,
        name: EngineName,
        memory: Memory,
        shared: Collection[str | int],
        dtype: torch.dtype | None,
    ) -> None:
        if name not in get_args(EngineName):
            raise ValueError(f"engine: expected one of {list(get_args(EngineName))}, found {name!r}")
        self.model = model
        self.num_clusters = num_clusters
        self._name = name
        self.memory = memory
        self.shared = frozenset(shared)
        self.dtype = dtype
        self._forget()

    def _forget(self) -> None:
        self._key: list[tuple[Any, ...]] = []
        self._values: Sequence[Tensor] = ()  # of the parameters, or in checks others
        self._aliases: list[Aliases] = []  # of every cluster
        self._step: Step | None = None  # of the last forward in slices
        self.slots: list[Slot] = []
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.grouped: GroupedEngine | None = None
        self.compiled: CompiledEngine | None = None
        self.training: tuple[bool, ...] = ()
        self._jacobian: Jacobian | None = None
        self.jacobian_in_use = False
        self._spare: Jacobian | None = None  # in checks of a compiled model
        self._second: Jacobian | None = None  # of a compiled model, while the first is in use
        self._model_check = ModelCheck(self)
        self._loss_check = LossCheck()
        self._told: str | None = None
        self._host_bound = HostBound()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Jacobian and the stand-ins behind when copied or pickled: `begin` makes new ones."""
        settings = ("model", "num_clusters", "_name", "memory", "shared", "dtype")
        return {name: self.__dict__[name] for name in settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def begin(self, model: nn.Module) -> bool:
        """Start a forward: find the trainable parameters, and renew the stand-ins if they have changed.

        Args:
            model: the model, which may be another one now.

        Returns:
            Whether they have, so that no forward before this one can share its backward.

        Raises:
            ValueError: see `find_slots`.
        """
        if model is not self.model:
            self.model, self._key = model, []
        self.slots, self.parameters = find_slots(self.model)
        self.training = tuple([module.training for module in modules_of(self.model)])
        self._values = self.parameters
        key = fingerprint(self.slots, self.parameters)
        changed = key != self._key
        if changed:
            self._key, self._jacobian, self._second = key, None, None
            self._model_check, self._loss_check = ModelCheck(self), LossCheck()
            self.names = parameter_names(self.model, self.parameters)
            self._aliases = self._make_aliases()
            self.grouped, self.compiled = self._make_engine()
        if self.grouped is not None:
            self.grouped.begin(self.training)
        return changed

    def _make_aliases(self) -> list[Aliases]:
        def step() -> Step:
            assert self._step is not None
            return self._step

        return [Aliases(self._values, self.names, k, step) for k in range(self.num_clusters)]

    def _make_engine(self) -> tuple[GroupedEngine | None, CompiledEngine | None]:
        if self._name == "sliced":
            self._tell("sliced", "as asked for")
            return None, None
        of = (self.model, self.slots, self.parameters, self.names)
        if self._compiled_part is None:
            return GroupedEngine(*of), None
        return None, CompiledEngine(*of)

    @property
    def _compiled_part(self) -> str | None:
        """The name of a compiled module, if there is one."""
        names = compiled_modules(self.model)
        return next((name or type(self.model).__name__ for name in names), None)

    def meet_others(self, ranks: Ranks) -> Replicas:
        """Return what these ranks, which train together, exchange in a step."""
        ranks.open_own_group()
        return Replicas(ranks, self.num_clusters)

    def meet(self, cluster: Tensor, by_cluster: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Exchange nothing with the other ranks before a forward."""

    def forward(self, step: Step, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model; the order of the samples in arguments and outputs is the batch's own.

        Raises:
            ValueError: slices of the batch do not give what the whole batch gives, or the model's outputs are not
                batches.
            RuntimeError: engine="grouped", and the model can't be grouped; or in `parametrize.cached`.
        """
        if parametrize_cached():
            raise RuntimeError(
                "expected a forward outside of torch.nn.utils.parametrize.cached(), found it inside, where "
                "clusters would share the tensors that gradients are told apart by"
            )
        given, ordered = (args, kwargs), layout.sort(args, kwargs, self.shared)
        if self.grouped is not None or self.compiled is not None:
            try:
                self._model_check.before(layout, given, ordered)
                output = self.run(step, layout, ordered)
                if self.compiled is not None and self.compiled.compiled_anew:
                    output = self._check_compilation(self.compiled, step, layout, given, ordered, output)
                return self._remember(step, layout.unsort(output))
            except CannotGroup as error:
                self._leave_grouped(error)
        self._model_check.before(layout, given, ordered)
        return self._remember(step, layout.unsort(self.run(step, layout, ordered)))

    def _check_compilation(
        self,
        compiled: CompiledEngine,
        step: Step,
        layout: BatchLayout,
        given: _Arguments,
        ordered: _Arguments,
        output: Any,
    ) -> Any:
        """Check what the compiler has made since the last check; the model runs again if that was not right."""
        done, shared = step.passes.pop(), set(compiled.shared)
        self._model_check.again(layout, given, ordered)
        if compiled.shared != shared:
            return self.run(step, layout, ordered)
        step.passes.append(done)
        compiled.prepare(done.number, self._target)  # the check has used the same memory
        return output

    def _leave_grouped(self, error: CannotGroup) -> None:
        if self._name == "grouped":
            raise RuntimeError(f"engine='grouped': {error}") from error
        self.grouped = self.compiled = None
        self._tell("sliced", str(error))

    def run(self, step: Step, layout: BatchLayout, ordered: _Arguments) -> Any:
        """Run the model on a sorted batch, so that the graph can tell the clusters apart."""
        args, kwargs = ordered
        if self.grouped is not None:
            output = self.grouped.forward(layout, step, args, kwargs)
            self._tell("grouped", self.grouped.describe())
            return output
        if self.compiled is not None:
            output = self.compiled.forward(layout, step, self._target, args, kwargs)
            self._tell("compiled", f"'{self._compiled_part}' is compiled, and every parameter has a rule")
            return output
        self._step = step
        step.begin_pass(layout.clusters)
        return self.run_slices(layout, ordered, self._aliases)

    def run_slices(self, layout: BatchLayout, ordered: _Arguments, stand_ins: Any) -> Any:
        """Run the model once per cluster, with stand-ins of the parameters for every one."""
        return run_slices(
            self.model,
            self.slots,
            stand_ins,
            layout,
            *ordered,
            shared=self.shared,
            writes=self._model_check.writes,
        )

    def _remember(self, step: Step, output: Any) -> Any:
        leaves = flatten(output)[0]
        step.passes[-1].outputs = [leaf for leaf in leaves if is_measured(leaf) and leaf.requires_grad]
        if self.compiled is not None:
            hook = partial(self._begin_backward, step, self.compiled, self._target)
            for leaf in step.passes[-1].outputs:
                leaf.register_hook(hook)
        return output

    def _begin_backward(
        self, step: Step, compiled: CompiledEngine, target: Jacobian, gradient: Tensor
    ) -> None:
        if step.store is not None:
            return
        if self.jacobian_in_use and target is self._jacobian:
            raise RuntimeError(
                "expected mtl.backward(loss) alone in no_sync(), found another backward, which would write over "
                "the gradients of the first one; call it outside"
            )
        compiled.begin_other_backward(target)

    def check_losses(self, step: Step, losses: Tensor) -> None:
        """Refuse losses that depend on other samples' outputs, once for every kind of them.

        Raises:
            ValueError: they do, or come from forwards with different clusters.
        """
        step.refuse_other_clusters()
        self._loss_check(losses, step.take_outputs())

    def collect(self, step: Step, objective: Tensor, store: Store) -> None:
        """Run the backward of a scalar; the parameters' gradients go to `store`, cluster by cluster.

        Args:
            step: whose forwards the scalar comes from.
            objective: what to differentiate: a sum over samples of the step's forwards.
            store: what takes the gradients.

        Raises:
            RuntimeError: gradients reached the parameters' ``.grad`` instead.
        """
        watched = [*self.parameters, *([] if self._values is self.parameters else self._values)]
        before = grad_versions(watched)
        with step.collecting(store), self.during_backward():
            objective.backward(retain_graph=store.keeps_graph)
            if self.compiled is not None:
                self.compiled.deliver(store)
        after = grad_versions(watched)
        if after != before:
            changed = [i % len(self.names) for i, a in enumerate(before) if a != after[i]]
            reached = [self.names[i] for i in dict.fromkeys(changed)]
            raise RuntimeError(
                f"model: expected gradients cluster by cluster alone, found some in the .grad of {reached}; in "
                "slices a reentrant checkpoint recomputes outside its slice (pass use_reentrant=False to "
                "checkpoint), a call without cluster= does not take part in the weighting, and parameters must be "
                "used as attributes of their modules"
            )

    def note_backward(self) -> None:
        """Take in that a backward was launched, after which the host waits for nothing before `advise`."""
        grouped = self.grouped if self._name == "auto" and self.memory == "full" else None
        if self._host_bound.found is None and grouped is not None and not grouped.slices.reasons:
            self._host_bound.note_backward(self.parameters[0].device)

    def advise(self) -> None:
        """Advise once to compile a model, as a whole by rules, whose steps a GPU waits for the host in."""
        if self._host_bound.found is None:
            self._host_bound.note_gramian()
            if self._host_bound.found:
                _logger.info("ClusteredMTL: %s", _ADVICE)

    def expected(self, step: Step) -> Mapping[int, int]:
        """Return how many gradients a store gets for each parameter in a step's backward, where that is known."""
        if self.compiled is not None:  # they come together, after it
            return {}
        positions = range(len(self.parameters))
        if self.grouped is None:
            slices = {k for each in step.passes for k in each.clusters.present}
            return dict.fromkeys(positions, len(slices))
        uses, in_slices = step.uses, self.grouped.slices.positions
        return {position: uses[position] for position in positions if position not in in_slices}

    def during_backward(self) -> Any:
        """Return a context that keeps the stand-ins in place, where checkpoints are recomputed."""
        if self.grouped is not None:
            return self.grouped.backward()
        if self.compiled is not None:
            return self.compiled.backward()
        # What slices recompute, they recompute with the parameters themselves; a check, with its other values.
        return nullcontext() if self._values is self.parameters else installed(self.slots, self._values)

    @contextmanager
    def standing_for(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Run the model with other values of the parameters, for a check."""
        engine = self.grouped or self.compiled
        if self.compiled is not None:
            self._spare = (
                Jacobian(self.parameters, self.num_clusters, self.dtype)
                if self.jacobian_in_use
                else self.jacobian
            )
            self._spare.clear()
        with nullcontext() if engine is None else engine.standing_for(values):
            aliases = self._aliases
            self._values = values
            self._aliases = self._make_aliases()
            try:
                yield
            finally:
                self._values, self._aliases, self._spare = self.parameters, aliases, None

    @property
    def eps(self) -> float:
        """The relative rounding of the lowest precision that gradients are known to be formed in."""
        dtypes = {p.dtype for p in self.parameters} | ({self.dtype} if self.dtype else set())
        device = self.parameters[0].device.type
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return max(*(torch.finfo(d).eps for d in dtypes), 2.0**-10 if device == "cuda" and tf32 else 0.0)

    @property
    def jacobian(self) -> Jacobian:
        """The Jacobian, whose memory is the same in all steps."""
        if self._jacobian is None:
            self._jacobian = Jacobian(self.parameters, self.num_clusters, self.dtype)
        return self._jacobian

    @property
    def _target(self) -> Jacobian:
        """Whose blocks the backward of a compiled model writes to."""
        if self._spare is not None:
            return self._spare
        if not self.jacobian_in_use:
            return self.jacobian
        if self._second is None:  # what is formed there is added to the first
            self._second = Jacobian(self.parameters, self.num_clusters, self.dtype)
        return self._second

    def store(self, step: Step) -> Store:
        """Return an empty store for a step's gradients.

        Raises:
            ValueError: memory="lean", and the model runs in slices as a whole.
        """
        if self.memory == "full":
            self.jacobian.clear()
            return self.jacobian
        if self.compiled is not None:
            raise ValueError(
                f"memory='lean': expected a model that is not compiled, found '{self._compiled_part}' compiled; "
                "use memory='full', with jacobian_dtype=torch.bfloat16 to halve it"
            )
        if self.grouped is None:
            raise ValueError(f"memory='lean': expected the grouped engine, found slices: {self._told}")
        # The second backward leaves out what is outside of the model, which such a checkpoint can't.
        if step.recomputes and self.grouped.reentrant:
            raise RuntimeError("memory='lean': expected checkpoints with use_reentrant=False, found others")
        by_row = self.grouped.slices.positions
        return LeanGramian(self.parameters, self.num_clusters, step.uses, by_row, step.recomputes, self.dtype)

    def spare_store(self, step: Step) -> Store:
        """Return a store for a check."""
        if self._spare is not None:
            return self._spare
        if self.jacobian_in_use:
            return Jacobian(self.parameters, self.num_clusters, self.dtype)
        store = self.store(step)
        store.poison()
        return store

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that the parameters' gradients end at."""
        aliases = self._aliases if self.grouped is None else self.grouped.slices.aliases
        return [*self._values, *(leaf for each in aliases for leaf in each.made)]

    def release(self) -> None:
        """Give the Jacobian's memory back."""
        self._jacobian = self._second = None
        if self.compiled is not None:
            self.compiled.release()

    def _tell(self, engine: str, why: str) -> None:
        """Log what was chosen and why, once until it changes."""
        message = f"{engine}: {why}"
        if message != self._told:
            count = sum(p.numel() for p in self.parameters)
            _logger.info(
                "ClusteredMTL: %s engine for K = %d and %d parameters: %s",
                engine,
                self.num_clusters,
                count,
                why,
            )
            self._told = message
