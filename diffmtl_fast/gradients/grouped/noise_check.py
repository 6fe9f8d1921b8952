"""Checks that grouping is exact: noise in some samples' rows must stay in these samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from ..batch import BatchLayout
from ..independence import halves, leaks, revealing, tolerance
from ..model_state import BufferSlot, ModelState
from ..parameters import module_name
from ..trees import copied, flatten, map_tensors, replace_rows
from .cluster_parameter import find_handles
from .operation import CannotGroup, Differentiated, NoRows, Operation, Unseen

if TYPE_CHECKING:
    from .grouped_engine import GroupedEngine

_Given = tuple[tuple[Any, ...], dict[str, Any]]


class Probe:
    """One forward of a check: noise is added to the rows of some samples wherever a parameter is used.

    Args:
        disturbed: bool [B], the samples whose rows get noise.
        operations: how many operations, the first ones, add it; default all.
        derivations: whether to look, besides, that gradients can be pulled back through what is computed from
            parameters.
        alike: an operation; no noise is added and nothing is grouped, but operations like it are recorded.

    Attributes:
        recorded: by their keys.
    """

    def __init__(
        self,
        disturbed: Tensor,
        operations: float = math.inf,
        *,
        derivations: bool = False,
        alike: Operation | None = None,
    ) -> None:
        self.disturbed = disturbed
        self.derivations = derivations
        self.alike = alike
        self.recorded: dict[tuple[Any, ...], list[Operation]] = {}
        self.operations = operations
        self.seen: list[Operation] = []
        self.visited: set[Any] = set()  # nodes of the graph

    def record(self, operation: Operation) -> None:
        """Keep an operation if it is of the kind that is looked for."""
        assert self.alike is not None
        kinds = [[type(owner) for owner in o.owners] for o in (operation, self.alike)]
        if operation.key[0] == self.alike.key[0] and kinds[0] == kinds[1]:
            self.recorded.setdefault(operation.key, []).append(operation)

    def disturb(self, out: Tensor, operation: Operation) -> Tensor:
        """Add the noise to an operation's output; like the real one, it requires a gradient."""
        batch_size = self.disturbed.shape[0]
        if self.alike is not None:
            return out.requires_grad_() * 1
        self.seen.append(operation)
        if out.dim() == 0 or out.shape[0] == 0 or out.shape[0] % batch_size:
            raise NoRows(operation, f"found an output {list(out.shape)} for {batch_size} samples")
        operation.tensors = []  # not to keep a whole forward's activations
        return self._disturb(out, batch_size).requires_grad_() * 1

    def _disturb(self, out: Tensor, batch_size: int) -> Tensor:
        if len(self.seen) > self.operations or not out.numel():
            return out
        rows = self.disturbed.to(out.device).repeat_interleave(out.shape[0] // batch_size)
        size = out[0].numel()
        noise = torch.cos(torch.arange(size, device=out.device) * 0.7 + len(self.seen)).view(out.shape[1:])
        noise = (noise * (1 + out.abs().float().mean())).to(out.dtype)
        return torch.where(rows.view(-1, *[1] * (out.dim() - 1)), out + noise, out)


class Verification:
    """Finds a way to run a model's operations that is exact, and makes sure that it stays so.

    Args:
        engine: the engine that runs it.

    Attributes:
        volatile: buffers that a forward writes to.
    """

    def __init__(self, engine: GroupedEngine) -> None:
        self._engine = engine
        self._differentiates = False  # whether the model forms gradients within its forward
        self.volatile: list[BufferSlot] = []

    def run(self, layout: BatchLayout, given: _Given) -> None:
        """Find a way to run the model on batches like this one that is exact.

        Raises:
            CannotGroup: only slices of the whole model would be.
        """
        with self._probing(given) as state:
            while not self._settles(layout, given, state):
                pass

    def _settles(self, layout: BatchLayout, given: _Given, state: ModelState) -> bool:
        """Check once; where something has to be run in another way, tell that it has to be checked again."""
        try:
            try:
                self._check(layout, given, state)
                return True
            except NoRows as error:
                self._give_way(error, layout, given, state)
        except Differentiated:
            self._differentiates = True
        except Unseen as error:
            self._engine.functions.add(error.function)
        return False

    def spot_check(self, layout: BatchLayout, given: _Given, disturbed: Tensor) -> NoRows | None:
        """Look again, with noise in some samples, bool [B], whether it stays there.

        Returns:
            The operation whose noise leaks, if one does.
        """
        with self._probing(given) as state:
            try:
                self._check_sets(layout, given, state, [disturbed])
            except NoRows as error:
                return error
            except Differentiated:
                self._differentiates = True
            except Unseen as error:  # seen from the next whole check on
                return NoRows(Operation(("unseen",), []), str(error))
        return None

    @contextmanager
    def _probing(self, given: _Given) -> Iterator[ModelState]:
        """Show the model parameters that hide nothing, and put everything back that its forwards change."""
        engine, state = self._engine, ModelState(self._engine.model)
        try:
            with (
                state.watching(engine.parameters),
                engine.standing_for([revealing(p) for p in engine.parameters]),
            ):
                yield state
        finally:
            state.restore()

    def _check(self, layout: BatchLayout, given: _Given, state: ModelState) -> None:
        """Look whether noise in some samples' rows stays in these samples."""
        self._engine.verified.update(self._check_sets(layout, given, state, list(halves(layout.batch_size))))

    def _check_sets(
        self, layout: BatchLayout, given: _Given, state: ModelState, sets: list[Tensor]
    ) -> list[tuple[Any, ...]]:
        """Add noise to each of some sets of samples; returns the keys of the operations that were seen."""

        def run(disturbed: Tensor, operations: float = math.inf) -> tuple[Probe, list[Any]]:
            return self._forward(layout, given, state, Probe(disturbed, operations))

        quiet = torch.zeros(layout.batch_size, dtype=torch.bool)
        first, expected = self._forward(layout, given, state, Probe(quiet, derivations=True))
        _, repeated = run(quiet)
        self.volatile = state.changed()
        tolerances = [tolerance(a, b) for a, b in zip(expected, repeated, strict=True)]
        keys = [operation.key for operation in first.seen]
        for disturbed in sets:
            probe, found = run(disturbed)
            if [operation.key for operation in probe.seen] != keys:
                raise CannotGroup("its operations differ from one call to the next with the same input")
            if not leaks(expected, found, tolerances, disturbed):
                continue
            culprit = _first_leak(
                len(keys),
                lambda n, d=disturbed: leaks(expected, run(d, n)[1], tolerances, d),  # type: ignore[misc]
            )
            raise NoRows(
                first.seen[culprit],
                "its rows of dimension 0 are not the samples' own, or samples are mixed after it",
            )
        return keys

    def _forward(
        self, layout: BatchLayout, given: _Given, state: ModelState, probe: Probe
    ) -> tuple[Probe, list[Any]]:
        engine, (args, kwargs) = self._engine, map_tensors(copied, given)
        state.restore()
        engine.probe = probe
        try:
            with (
                engine.installed(layout, None),
                torch.enable_grad(),
                self._saving(),
                _checkpoints_run_plainly(engine),
            ):
                outputs = flatten(engine.refuse_handles(engine.model(*args, **kwargs)))[0]
                engine.dispatch.check_seen(outputs)
            # Without their graphs: several at a time would be the peak of the whole training's memory.
            return probe, [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        finally:
            engine.probe = None
            probe.visited.clear()

    def _saving(self) -> Any:
        """Let the graphs of a check save no activations, unless the model differentiates within its forward."""
        if self._differentiates:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(_nothing, _refuse_saved)

    # Other ways for what can't be grouped.

    def _give_way(self, error: NoRows, layout: BatchLayout, given: _Given, state: ModelState) -> None:
        """Find another way for an operation that can't be grouped."""
        operation, engine = error.operation, self._engine
        if operation.constant and operation.key not in engine.constant:
            alike = self._constant_like(operation, layout, given, state)
            if operation.key in (each.key for each in alike):
                engine.constant |= {each.key: self._describe(each, error) for each in alike}
                return
            if not self._depends_on_samples(operation, layout, given, state):
                engine.constant[operation.key] = self._describe(operation, error)
                return
        engine.slices.add(operation.owners, str(error))

    def _describe(self, operation: Operation, error: NoRows) -> str:
        names = [module_name(self._engine.model, module) for module in operation.owners]
        return f"{', '.join(names)}: {error}"

    def _constant_like(
        self, operation: Operation, layout: BatchLayout, given: _Given, state: ModelState
    ) -> list[Operation]:
        """Return the operations like this one whose other arguments do not change when the samples do.

        All of them at once: an adapter may have one in every layer.
        """
        quiet = torch.zeros(layout.batch_size, dtype=torch.bool)
        found = []
        for arguments in (given, _vary(given, layout.batch_size)):
            probe = Probe(quiet, alike=operation)
            self._forward(layout, arguments, state, probe)
            found.append(probe.recorded)
        first, second = found
        return [uses[0] for key, uses in first.items() if _same_constants(uses, second.get(key, []))]

    def _depends_on_samples(
        self, operation: Operation, layout: BatchLayout, given: _Given, state: ModelState
    ) -> bool:
        """Tell whether an operation's other arguments change when the samples do."""
        quiet, found = torch.zeros(layout.batch_size, dtype=torch.bool), []
        for arguments in (given, _vary(given, layout.batch_size)):
            try:
                self._forward(layout, arguments, state, Probe(quiet, derivations=True))
                return True
            except NoRows as error:
                if error.operation.key != operation.key:
                    return True
                found.append(error.operation)
        return not _same_constants(found[:1], found[1:])


def _same_constants(first: list[Operation], second: list[Operation]) -> bool:
    """Tell whether uses of parameters were given constants, and the same ones."""
    if len(first) != len(second) or not all(use.constant for use in (*first, *second)):
        return False
    pairs = [
        pair for a, b in zip(first, second, strict=True) for pair in zip(a.tensors, b.tensors, strict=True)
    ]
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _vary(given: _Given, batch_size: int) -> _Given:
    """Give every sample the arguments of the next one, and noise where they are no whole numbers."""

    def noisy(tensor: Tensor) -> Tensor:
        batched = tensor.dim() and tensor.shape[0] == batch_size and tensor.is_floating_point()
        return (
            tensor
            + torch.linspace(0.3, 0.7, batch_size, device=tensor.device, dtype=tensor.dtype).view(
                -1, *[1] * (tensor.dim() - 1)
            )
            if batched
            else tensor
        )

    args, kwargs = replace_rows(*given, torch.arange(1, batch_size + 1) % batch_size)
    return map_tensors(noisy, args), map_tensors(noisy, kwargs)


@contextmanager
def _checkpoints_run_plainly(engine: GroupedEngine) -> Iterator[None]:
    """Let reentrant checkpoints run in a check's forward as they will in backward, with gradients."""
    original = torch.utils.checkpoint.CheckpointFunction

    class Plain(original):  # type: ignore[misc, valid-type]
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            if find_handles(args):  # a parameter handed to a torch.autograd.Function
                return original.apply(function, preserve, *args)
            engine.reentrant = True
            return function(*args)

    torch.utils.checkpoint.CheckpointFunction = Plain  # type: ignore[misc]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = original  # type: ignore[misc]


def _nothing(tensor: Tensor) -> None:
    return None


def _refuse_saved(nothing: None) -> Tensor:
    raise Differentiated("the forward of the model differentiates")


def _first_leak(operations: int, leaks: Callable[[int], bool]) -> int:
    """Return the index of the operation whose noise is the first to leak, by bisection."""
    low, high = 0, operations
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if leaks(middle) else (middle, high)
    return low
