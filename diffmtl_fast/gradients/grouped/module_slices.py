"""Modules that run in slices, one per cluster, within a model that runs as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..independence import agree, interact
from ..model_state import ModelState, evaluating
from ..parameters import installed, module_name, parent_of
from ..sliced import Aliases, Transposition, run_slices
from ..trees import flatten
from .cluster_parameter import find_tensors
from .dispatch import shape_per_sample
from .operation import CannotGroup, NoRows, Operation, Unverified

if TYPE_CHECKING:
    from .grouped_engine import GroupedEngine

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class ModuleSlices:
    """The modules that run in slices, and why.

    Args:
        engine: the engine whose model they belong to.

    Attributes:
        reasons: why each of them does.
        aliases: the stand-ins of the parameters for every cluster, made when there is such a module.
    """

    def __init__(self, engine: GroupedEngine) -> None:
        self._engine = engine
        self.reasons: dict[nn.Module, str] = {}
        self._values: Sequence[Tensor] = engine.parameters
        self.aliases: list[Aliases] = []
        self._writing: set[nn.Module] = set()  # modules that write their own parameters

    def stand_for(self, values: Sequence[Tensor]) -> None:
        """Let the modules in slices see these values of the parameters."""
        self.aliases, self._values = [], values

    def _of_clusters(self, num: int) -> list[Aliases]:
        if len(self.aliases) != num:
            engine = self._engine
            self.aliases = [Aliases(self._values, engine.names, k, engine.current_step) for k in range(num)]
        return self.aliases

    @property
    def positions(self) -> set[int]:
        """The parameters of these modules."""
        within = {inner for module in self.reasons for inner in module.modules()}
        return {slot.position for slot in self._engine.slots if slot.module in within}

    def add(self, modules: list[nn.Module], why: str) -> None:
        """Run modules in slices from now on; where they are already, the modules around them.

        Raises:
            CannotGroup: the module around them is the model.
        """
        model, covered = self._engine.model, set[nn.Module]()
        for module in modules:
            if module in covered:
                continue
            wanted: nn.Module | None = module
            while wanted is not None and (wanted in self.reasons or isinstance(wanted, _CONTAINERS)):
                wanted = parent_of(model, wanted)
            if wanted is None or wanted is model:
                raise CannotGroup(f"{module_name(model, module)}: {why}")
            within = set(wanted.modules())
            self.reasons = {m: reason for m, reason in self.reasons.items() if m not in within}
            self.reasons[wanted] = why
            covered |= within

    def forwards(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Return what the modules are to run in the place of their own forward."""
        return [(module, self._forward_of(module)) for module in self.reasons]

    def _forward_of(self, module: nn.Module) -> Callable[..., Any]:
        own, transposition, engine = module.forward, Transposition(module), self._engine
        within = set(module.modules())
        slots = [slot for slot in engine.slots if slot.module in within]

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = transposition.arguments(args, kwargs)
            return transposition.outputs(own(*args, **kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = transposition.arguments(args, kwargs)
            return transposition.outputs(run_rows(*args, **kwargs))

        def run_rows(*args: Any, **kwargs: Any) -> Any:
            layout = engine.layout
            assert layout is not None
            tensors = find_tensors((args, kwargs))
            key = (
                id(module),
                *(shape_per_sample(t, layout.batch_size) for t in tensors),
                layout.batch_size == 1,
            )

            def run_on(aliases: Any) -> Any:
                writes = module in self._writing
                return run_slices(forward, slots, aliases, layout, args, kwargs, folded=True, writes=writes)

            if engine.probe is not None:
                engine.dispatch.check_seen((args, kwargs))
                operation = Operation(key, [module], find_tensors((args, kwargs)))
                whole = lambda a, k: forward(*a, **k)  # noqa: E731
                return self._probe(module, operation, slots, whole, run_on, args, kwargs)
            if engine.dispatch.is_new(key):
                raise Unverified("slices", [module_name(engine.model, module)])
            if not torch.is_grad_enabled():
                return run_on([engine.values] * layout.clusters.num)
            return run_on(self._of_clusters(layout.clusters.num))

        return run

    def _probe(
        self,
        module: nn.Module,
        operation: Operation,
        slots: list[Any],
        whole: Callable[[Any, Any], Any],
        run_on: Callable[[Any], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Check that slices of a module compute what the module does, and add noise to its output."""
        engine = self._engine
        probe = engine.probe
        assert probe is not None
        state = ModelState(module)
        with torch.no_grad(), installed(slots, engine.values), state.watching(engine.values):
            output = whole(args, kwargs)
            if state.writes:
                self._writing.add(module)
            if not probe.disturbed.any():
                warm = ModelState(
                    module
                )  # buffers that are filled by the first forward are no reason to refuse
                with warm.watching(engine.values):
                    try:
                        self._check(module, operation, whole, run_on, args, kwargs, warm)
                    finally:
                        warm.restore()
        leaves, rebuild, _ = flatten(output)
        noisy = [
            probe.disturb(leaf, operation) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in leaves
        ]
        return rebuild(noisy)

    def _check(
        self,
        module: nn.Module,
        operation: Operation,
        whole: Callable[[Any, Any], Any],
        run_on: Callable[[Any], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        warm: ModelState,
    ) -> None:
        """Refuse to slice a module if that computes something else than the module does."""
        layout = self._engine.layout
        assert layout is not None
        try:
            with evaluating(module):
                expected = whole(args, kwargs)
                drawn = warm.drawn
                warm.restore()
                parts = run_on([self._engine.values] * layout.clusters.num)
            warm.restore()
            mixed = interact(lambda a, k: whole(a, k), args, kwargs, layout.batch_size, warm, folded=True)
        except (ValueError, RuntimeError) as error:
            raise NoRows(operation, f"slices of it fail: {error}") from error
        same = agree(expected, parts, warm.eps)
        if drawn and not same:
            raise NoRows(operation, "it draws random numbers in evaluation mode, too, and slices draw others")
        if mixed or not same:
            raise NoRows(operation, "slices of it compute something else than the whole")
        if changed := warm.changed():
            raise NoRows(operation, f"it updates its buffer '{changed[0].name}', slices would several times")
