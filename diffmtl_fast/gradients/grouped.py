"""The grouped engine: the whole batch at once; only the parameters' gradients are formed cluster by cluster."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .agreement import BufferSlot, State, agree, evaluating, halves, interact, leaks, revealing, tolerance
from .handle import (
    Call,
    ClusterParameter,
    derive,
    find_handles,
    find_tensors,
    find_unseen,
    pull_back,
    repeatable,
    substitute,
)
from .layout import BatchLayout, Clusters, flags, flatten
from .parameters import Slot, forwards_replaced, installed, module_name, parent_of
from .receiver import Receiver, Store
from .rules import PER_SAMPLE, RULES, NoClusterRule, Registered, RuleContext
from .sliced import Aliases, Transposition, run_slices

# Operations that broadcast: a parameter among their arguments may be given once per row of the batch instead.
_BROADCASTING = frozenset(
    [
        *("add", "add_", "sub", "sub_", "subtract", "rsub", "__rsub__", "mul", "mul_", "multiply"),
        *("div", "div_", "divide", "true_divide", "__rdiv__", "pow", "__rpow__", "addcmul", "lerp"),
        *("where", "maximum", "minimum", "clamp", "clip"),
    ]
)
# So do these along any dimension but the samples'.
_JOINING = frozenset(["cat", "concat", "concatenate", "stack"])
# With these a parameter is given to every sample, as a class token is.
_REPEATING = frozenset(["expand", "broadcast_to", "repeat", "tile"])
# Operations that ask another tensor only for its shape or type: what they do, and what to ask for.
_LIKE: dict[Any, tuple[Any, Callable[[Tensor], tuple[Any, ...]]]] = {
    Tensor.expand_as: (Tensor.expand, lambda other: (other.shape,)),
    Tensor.view_as: (Tensor.view, lambda other: (other.shape,)),
    Tensor.reshape_as: (Tensor.reshape, lambda other: (other.shape,)),
    Tensor.type_as: (Tensor.to, lambda other: (other.device, other.dtype)),
    Tensor.to: (Tensor.to, lambda other: (other.device, other.dtype)),
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class CannotGroup(RuntimeError):
    """The model as a whole has to run in slices; says why."""


class _Differentiated(RuntimeError):
    """The model formed gradients in a check's forward, for which nothing was saved."""


class _Unverified(RuntimeError):
    """An operation came up that no check has seen; in a forward it is checked now."""

    def __init__(self, operation: str, owners: Iterable[str]) -> None:
        super().__init__(
            f"model: expected checkpoints to repeat operations of the forward, found {operation} of "
            f"{sorted(owners)} in the backward alone"
        )


class _Operation:
    """One use of parameters, for checks.

    Args:
        key: names it, and the shape of a sample's part in it; what was checked holds for all uses of this name.
        owners: the modules whose parameters they are.
        constant: whether its other arguments do not depend on parameters.
    """

    def __init__(self, key: tuple[Any, ...], owners: list[nn.Module], constant: bool = False) -> None:
        self.key, self.owners, self.constant = key, owners, constant


class _Probe:
    """One forward of a check: noise is added to the rows of some samples wherever a parameter is used.

    Args:
        disturbed: bool [B], the samples whose rows get noise.
        operations: how many operations, the first ones, add it; default all.
    """

    def __init__(self, disturbed: Tensor, operations: float = math.inf) -> None:
        self.disturbed = disturbed
        self.operations = operations
        self.seen: list[_Operation] = []
        self.visited: set[Any] = set()  # nodes of the graph

    def disturb(self, out: Tensor, operation: _Operation) -> Tensor:
        """Add the noise to an operation's output; like the real one, it requires a gradient."""
        self.seen.append(operation)
        batch_size = self.disturbed.shape[0]
        if out.dim() == 0 or out.shape[0] == 0 or out.shape[0] % batch_size:
            raise _NoRows(operation, f"found an output {list(out.shape)} for {batch_size} samples")
        return self._disturb(out, batch_size).requires_grad_() * 1

    def _disturb(self, out: Tensor, batch_size: int) -> Tensor:
        if len(self.seen) > self.operations:
            return out
        rows = self.disturbed.to(out.device).repeat_interleave(out.shape[0] // batch_size)
        size = out[0].numel()
        noise = torch.cos(torch.arange(size, device=out.device) * 0.7 + len(self.seen)).view(out.shape[1:])
        noise = (noise * (1 + out.float().abs().mean())).to(out.dtype)
        return torch.where(rows.view(-1, *[1] * (out.dim() - 1)), out + noise, out)


class _NoRows(NoClusterRule):
    """An operation can't be grouped."""

    def __init__(self, operation: _Operation, why: str) -> None:
        super().__init__(why)
        self.operation = operation


class GroupedEngine:
    """Per-cluster gradients from one forward and one backward of the whole batch.

    In the parameters' places the modules find handles. An operation that meets one is run by its `ClusterRule`,
    whose backward forms the parameter's gradients of all clusters. A parameter that is combined element by
    element with a batch is given once per row. Tensors computed from parameters and constants alone (casts,
    chunks, weight normalisation, embeddings of positions) are handles too, and gradients are pulled back through
    them. A module with an operation for which there is no rule runs in slices, and so does one in which the
    samples do not keep to their own rows of dimension 0, and one that uses a parameter in a way that no tensor
    subclass sees.

    The gradients of a cluster are right if whatever an operation writes to a sample's rows has an effect on that
    sample's output alone. That is checked, not assumed: before operations of new shapes are first used, a few
    forwards without gradient add noise to the rows of varying halves of the samples and look where the output
    changes; and again before a call with other flags (see `flags`), which may do other things with them.

    Args:
        model: the model.
        slots: where its modules look its trainable parameters up.
        parameters: the parameters.
        num_clusters: K.
        receiver: where gradients go.

    Attributes:
        sliced: the modules that run in slices, and why.
        uses: how many operations each parameter took part in since `begin`.
        recomputes: whether activations of a forward since then are packed away, to be recomputed or fetched in
            backward.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: list[Slot],
        parameters: list[nn.Parameter],
        num_clusters: int,
        receiver: Receiver,
    ) -> None:
        self._model = model
        self._slots = slots
        self.parameters = parameters
        self.receiver = receiver
        self._handles = [ClusterParameter.make(p, (i,), None, self) for i, p in enumerate(parameters)]
        self._aliases = [Aliases(parameters, k, receiver) for k in range(num_clusters)]
        self._verified: set[tuple[Any, ...]] = set()
        self._verified_flags: set[tuple[Any, ...]] = set()
        self._constant: dict[tuple[Any, ...], str] = {}  # operations on no batch, and how that was found out
        self._training: list[bool] = []
        self._volatile: list[BufferSlot] = []  # buffers that a forward writes to
        self._layout: BatchLayout | None = None  # of the forward that is running
        self._last: BatchLayout | None = None  # of the last forward
        self._recomputing = False
        self._batches: set[tuple[int, ...]] = set()  # the bounds of the clusters in this step's forwards
        self._probe: _Probe | None = None  # while a check is running
        self._differentiates = False  # whether the model forms gradients within its forward
        self.sliced: dict[nn.Module, str] = {}
        self.uses: Counter[int] = Counter()
        self.recomputes = False

    def begin(self) -> None:
        """Start a step."""
        self.uses.clear()
        self.recomputes = False
        self._batches.clear()
        training = [module.training for module in self._model.modules()]
        if training != self._training:  # the same operations may now have other effects
            self._training = training
            self._verified.clear()
            self._verified_flags.clear()

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors of the graph that gradients end at."""
        return [*self.parameters, *(leaf for aliases in self._aliases for leaf in aliases.leaves)]

    def forward(self, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model on a sorted batch.

        Raises:
            CannotGroup: only slices of the whole model would be exact.
        """
        self._batches.add(layout.clusters.bounds)
        given = (layout.batch_size == 1, *flags(args, kwargs))
        if given not in self._verified_flags:
            self._verify(layout, args, kwargs)
            self._verified_flags.add(given)
        for _ in range(3 + len(self._slots)):
            state = State(self._model, self._volatile if self._verified else None)
            try:
                with self.installed(layout):
                    return self._refuse_handles(self._model(*args, **kwargs))
            except _NoRows as error:  # before the first operation that no check has seen
                state.restore()
                self._give_way(error)
            except _Unverified:
                state.restore()
                self._verify(layout, args, kwargs)
        raise CannotGroup("its operations differ from one call to the next with the same input")

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Let the model see the handles in backward, where checkpoints are recomputed."""
        assert self._last is not None
        self._recomputing = True
        try:
            with self.installed(self._last):
                yield
        finally:
            self._recomputing = False

    @contextmanager
    def installed(self, layout: BatchLayout) -> Iterator[None]:
        """Let the model see the handles."""
        before = self._layout
        self._layout = self._last = layout
        forwards = [(module, self._in_slices(module)) for module in self.sliced]
        try:
            with installed(self._slots, self._handles), forwards_replaced(forwards):
                yield
        finally:
            self._layout = before

    # What a use of a handle means.

    def operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation with handles among its arguments."""
        if self._layout is None:
            return func(*substitute(args, _value), **substitute(kwargs, _value))
        if self._probe is not None:
            self._check_seen((args, kwargs))
        if registered := RULES.get(func):
            values = self._bind(registered, args, kwargs)
            if isinstance(values[0], Tensor) and not isinstance(values[0], ClusterParameter):
                used = [value for value in values if isinstance(value, ClusterParameter)]
                key = self._key(registered.rule, values[0], used)
                if key in self._constant:
                    return self._derive(func, args, kwargs)
                return self._apply(registered, values, key)
        if func in _LIKE and len(args) > 1 and isinstance(args[1], Tensor):
            return self._like(func, args, kwargs)
        if any(True for _ in find_tensors((args, kwargs))):
            return self._broadcast(func, args, kwargs)
        return self._derive(func, args, kwargs)

    def _bind(self, registered: Registered, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        try:
            return registered.bind(args, kwargs)
        except NoClusterRule as error:
            raise self._no_rule(registered.operation, args, kwargs, str(error)) from error

    def _apply(self, registered: Registered, values: list[Any], key: tuple[Any, ...]) -> Tensor:
        """Run an operation by its rule."""
        assert self._layout is not None
        handles = {i: v for i, v in enumerate(values) if isinstance(v, ClusterParameter)}
        precision = registered.rule.precision
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and i not in handles:
                values[i] = precision(value)
        plain = [handles[i].value if i in handles else v for i, v in enumerate(values)]
        try:
            if self._probe is not None:
                self._check_derived(handles)
                with torch.no_grad():
                    out = _run_forward(registered, RuleContext(), plain, handles)
                return self._probe.disturb(out, self._operation(key, values))
            if self._is_new(key):
                names = {module_name(self._model, m) for m in self._owners(handles.values())}
                raise _Unverified(registered.operation.__name__, names)
            self.recomputes = self.recomputes or not torch.is_grad_enabled() or _packs_activations()
            for handle in handles.values():
                self.uses.update(handle.origins)
            use = _Use(registered, handles, self._layout, self, self._recomputing)
            apply = _Apply.apply if torch._C._are_functorch_transforms_active() else _apply_node
            result: Tensor = apply(use, *plain)
            return result
        except _NoRows:
            raise
        except NoClusterRule as error:
            raise _NoRows(self._operation(key, values), str(error)) from error

    def _is_new(self, key: tuple[Any, ...]) -> bool:
        """Tell whether an operation has to be checked; reentrant checkpoints run it again, with gradients."""
        return torch.is_grad_enabled() and key not in self._verified

    def _key(self, what: Any, batch: Tensor | int, handles: Iterable[ClusterParameter]) -> tuple[Any, ...]:
        """Name an operation and the shape of a sample's part in it."""
        assert self._layout is not None
        used = [h.origins if h.source is None else (h.origins, h.shape) for h in handles]
        return (
            what,
            tuple(used),
            _shape_per_sample(batch, self._layout.batch_size),
            self._layout.batch_size == 1,
        )

    def _operation(self, key: tuple[Any, ...], arguments: Any) -> _Operation:
        constant = torch.is_grad_enabled() and not any(t.requires_grad for t in find_tensors(arguments))
        return _Operation(key, self._owners(find_handles(arguments)), constant)

    def _broadcast(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an element-wise operation with every parameter given once per row of the batch."""
        widest = max(find_tensors((args, kwargs)), key=lambda t: (t.dim(), t.shape[0] if t.dim() else 0))
        dims, rows = widest.dim(), widest.shape[0] if widest.dim() else 0
        name = getattr(func, "__name__", str(func))
        key = self._key(name, widest, find_handles((args, kwargs)))
        if key in self._constant:
            return self._derive(func, args, kwargs)
        if name in _JOINING:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            allowed = isinstance(dim, int) and dim % (dims + (name == "stack")) != 0
        else:
            allowed = name in _BROADCASTING
        if not allowed:
            raise self._no_rule(func, args, kwargs, f"no rule for {name}", key)

        def per_row(handle: ClusterParameter) -> Tensor:
            if rows == 0 or not _lacks_rows(handle.value, dims):
                why = f"{name} of {list(handle.value.shape)} with a batch of {dims} dims"
                raise self._no_rule(func, args, kwargs, why, key)
            return self._give_rows(handle, dims, rows, key)

        return func(*substitute(args, per_row), **substitute(kwargs, per_row))

    def _give_rows(self, handle: ClusterParameter, dims: int, rows: int, key: tuple[Any, ...]) -> Tensor:
        """Return a parameter once per row, with so many dimensions in all."""
        copies = self._apply(PER_SAMPLE, [handle, rows], key)
        extra = dims - handle.value.dim()  # dimensions of the batch that the parameter does not have
        if extra == 0:
            return copies.squeeze(1)
        return copies.reshape(rows, *[1] * (extra - 1), *handle.value.shape)

    def _derive(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on parameters and constants alone: it gives a handle, or a batch of copies."""
        # A check looks at what a reentrant checkpoint will do in backward, where gradients are enabled.
        with nullcontext() if self._probe is None else torch.enable_grad():
            result = func(*substitute(args, _value), **substitute(kwargs, _value))
        if not _has_tensor(result):
            return result
        if getattr(func, "__name__", "") in _REPEATING and isinstance(args[0], ClusterParameter):
            assert self._layout is not None
            handle, shape = args[0], result.shape
            key = self._key("repeat", shape[0], (handle,))
            per_sample = shape[0] % self._layout.batch_size == 0 and _lacks_rows(handle.value, len(shape))
            if per_sample and key not in self._constant:
                copies = self._give_rows(handle, len(shape), shape[0], key)
                return copies.repeat(1, *(n // m for n, m in zip(shape[1:], copies.shape[1:], strict=True)))
        return derive(Call(func, args, kwargs), result, self)

    def _like(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that asks its second argument only for its shape or type."""
        first, other, *rest = args
        if not isinstance(first, ClusterParameter):
            return func(first, other.value, *rest, **kwargs)
        func, ask = _LIKE[func]
        return self._derive(func, (first, *ask(_plain(other)), *rest), kwargs)

    def _check_derived(self, handles: dict[int, ClusterParameter]) -> None:
        """Look whether gradients can be pulled back through the tensors computed from parameters."""
        values = [handle.value for handle in self._handles]
        for handle in handles.values():
            if handle.source is None:
                continue
            if not repeatable(handle, values):
                raise NoClusterRule("computed from parameters at random, or written to in place")
            try:
                pull_back(handle, torch.ones_like(handle.value).unsqueeze(0), self.parameters)
            except RuntimeError as error:
                raise NoClusterRule(f"no gradient can be pulled back to its parameters: {error}") from error

    def _check_seen(self, arguments: Any) -> None:
        """Look whether a handle was used unseen on the way to an operation's arguments, or to the outputs."""
        assert self._probe is not None
        tensors = itertools.chain(find_tensors(arguments), find_handles(arguments))
        handle = find_unseen(tensors, self._probe.visited)
        if handle is not None:
            key = self._key("unseen", 1, (handle,))
            raise _NoRows(
                _Operation(key, self._owners([handle])),
                "a torch.autograd.Function or C++ takes a parameter itself, unseen by tensor subclasses",
            )

    def refuse_unseen(self, handle: ClusterParameter) -> None:
        """Refuse a gradient that came to a handle, where no check saw that it would."""
        names = [
            f"{module_name(self._model, s.module)}.{s.name}"
            for s in self._slots
            if s.position in handle.origins
        ]
        raise RuntimeError(
            f"model: expected operations that tensor subclasses see, found a gradient of {names} from one that "
            "they do not see (a torch.autograd.Function or C++ that takes the parameter itself); use "
            "engine='sliced'"
        )

    def _refuse_handles(self, output: Any) -> Any:
        """Refuse outputs that do not depend on the samples, as far as can be seen."""
        if any(isinstance(leaf, ClusterParameter) for leaf in flatten(output)[0]):
            why = "; ".join(dict.fromkeys(self._constant.values())) or "it is computed from parameters alone"
            raise CannotGroup(f"an output is not one row per sample: {why}")
        return output

    def refuse_ambiguity(self) -> None:
        """Refuse gradients of a graph made in backward where it is not known for which batch it was made."""
        if len(self._batches) > 1:
            raise RuntimeError(
                "model: expected one batch per backward with reentrant checkpoints, found forwards of several; "
                "pass use_reentrant=False to checkpoint"
            )

    def deliver(self, handle: ClusterParameter, gradients: Tensor) -> None:
        """Hand the gradients [K, ...] of a handle to the store."""
        store = self.receiver.store
        assert store is not None
        if handle.source is None:
            store.add(handle.origins[0], gradients)
            return
        for origin, found in zip(handle.origins, pull_back(handle, gradients, self.parameters), strict=True):
            store.add(origin, found)

    # Modules in slices.

    def positions_in_slices(self) -> set[int]:
        """Return the parameters of the modules that run in slices."""
        within = {inner for module in self.sliced for inner in module.modules()}
        return {slot.position for slot in self._slots if slot.module in within}

    def _in_slices(self, module: nn.Module) -> Callable[..., Any]:
        own, transposition = module.forward, Transposition(module)
        within = set(module.modules())
        slots = [slot for slot in self._slots if slot.module in within]

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = transposition.arguments(args, kwargs)
            return transposition.outputs(own(*args, **kwargs))

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = transposition.arguments(args, kwargs)
            return transposition.outputs(run_rows(*args, **kwargs))

        def run_rows(*args: Any, **kwargs: Any) -> Any:
            layout = self._layout
            assert layout is not None
            tensors = find_tensors((args, kwargs))
            key = (
                id(module),
                *(_shape_per_sample(t, layout.batch_size) for t in tensors),
                layout.batch_size == 1,
            )
            if self._probe is not None:
                self._check_seen((args, kwargs))
                return self._probe_slices(module, forward, slots, key, args, kwargs)
            if self._is_new(key):
                raise _Unverified("slices", [module_name(self._model, module)])
            aliases: Any = self._aliases
            if not torch.is_grad_enabled():
                aliases = [self.parameters] * layout.clusters.num
            return run_slices(forward, slots, aliases, layout, args, kwargs, folded=True)

        return run

    def _probe_slices(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        slots: list[Slot],
        key: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Check that slices of a module compute what the module does, and add noise to its output."""
        probe, layout = self._probe, self._layout
        assert probe is not None
        assert layout is not None
        values = [handle.value for handle in self._handles]
        operation = _Operation(key, [module])
        with torch.no_grad(), installed(slots, values):
            output = forward(*args, **kwargs)
            if not probe.disturbed.any():
                state = State(module)
                try:
                    self._check_slices(module, forward, slots, operation, args, kwargs)
                finally:
                    state.restore()
        leaves, rebuild, _ = flatten(output)
        noisy = [
            probe.disturb(leaf, operation) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in leaves
        ]
        return rebuild(noisy)

    def _check_slices(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        slots: list[Slot],
        operation: _Operation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Refuse to slice a module if that computes something else than the module does."""
        layout = self._layout
        assert layout is not None
        same: Any = [[handle.value for handle in self._handles]] * layout.clusters.num
        try:
            with evaluating(module):
                whole = forward(*args, **kwargs)
                parts = run_slices(forward, slots, same, layout, args, kwargs, folded=True)
            warm = State(module)  # buffers that are filled by the first forward are no reason to refuse
            size = layout.batch_size
            mixed = interact(lambda a, k: forward(*a, **k), args, kwargs, size, warm, folded=True)
        except (ValueError, RuntimeError) as error:
            raise _NoRows(operation, f"slices of it fail: {error}") from error
        if mixed or not agree(whole, parts):
            raise _NoRows(operation, "slices of it compute something else than the whole")
        if changed := warm.changed():
            raise _NoRows(operation, f"it updates its buffer '{changed[0].name}', slices would several times")

    def _slice(self, modules: list[nn.Module], why: str) -> None:
        """Run modules in slices from now on; where they are already, the modules around them."""
        covered: set[nn.Module] = set()
        for module in modules:
            if module in covered:
                continue
            wanted: nn.Module | None = module
            while wanted is not None and (wanted in self.sliced or isinstance(wanted, _CONTAINERS)):
                wanted = parent_of(self._model, wanted)
            if wanted is None or wanted is self._model:
                raise CannotGroup(f"{module_name(self._model, module)}: {why}")
            within = set(wanted.modules())
            self.sliced = {m: reason for m, reason in self.sliced.items() if m not in within}
            self.sliced[wanted] = why
            covered |= within

    def _owners(self, handles: Any) -> list[nn.Module]:
        origins = {o for handle in handles for o in handle.origins}
        return list(dict.fromkeys(slot.module for slot in self._slots if slot.position in origins))

    def _no_rule(
        self, func: Any, args: Any, kwargs: Any, why: str, key: tuple[Any, ...] | None = None
    ) -> _NoRows:
        key = key or (func, tuple(h.origins for h in find_handles((args, kwargs))))
        return _NoRows(self._operation(key, (args, kwargs)), why)

    def _give_way(self, error: _NoRows) -> None:
        """Find another way for an operation that can't be grouped."""
        operation = error.operation
        if operation.constant and operation.key not in self._constant:
            self._constant[operation.key] = self._describe(operation, error)
        else:
            self._slice(operation.owners, str(error))

    def _describe(self, operation: _Operation, error: _NoRows) -> str:
        return f"{', '.join(module_name(self._model, m) for m in operation.owners)}: {error}"

    # The check.

    def _verify(self, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find a way to run the model on batches like this one that is exact, or raise `CannotGroup`."""
        state = State(self._model)
        originals = [handle.value for handle in self._handles]
        try:
            for handle in self._handles:
                handle.value = revealing(handle.value)
            while True:
                try:
                    self._check(layout, args, kwargs, state)
                    return
                except _NoRows as error:
                    self._give_way(error)
                except _Differentiated:
                    self._differentiates = True
        finally:
            for handle, value in zip(self._handles, originals, strict=True):
                handle.value = value
            state.restore()

    def _saving(self) -> Any:
        """Let the graphs of a check save no activations, unless the model differentiates within its forward."""
        if self._differentiates:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(_nothing, _refuse_saved)

    def _check(
        self, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any], state: State
    ) -> None:
        """Look whether noise in some samples' rows stays in these samples."""

        def run(disturbed: Tensor, operations: float = math.inf) -> tuple[_Probe, list[Any]]:
            state.restore()
            probe = self._probe = _Probe(disturbed, operations)
            try:
                with self.installed(layout), torch.enable_grad(), self._saving():
                    outputs = flatten(self._refuse_handles(self._model(*args, **kwargs)))[0]
                    self._check_seen(outputs)
                # Without their graphs: several at a time would be the peak of the whole training's memory.
                return probe, [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs]
            finally:
                self._probe = None
                probe.visited.clear()

        quiet = torch.zeros(layout.batch_size, dtype=torch.bool)
        (first, expected), (_, repeated) = run(quiet), run(quiet)
        self._volatile = state.changed()
        tolerances = [tolerance(a, b) for a, b in zip(expected, repeated, strict=True)]
        keys = [operation.key for operation in first.seen]
        for disturbed in halves(layout.batch_size):
            probe, found = run(disturbed)
            if [operation.key for operation in probe.seen] != keys:
                raise CannotGroup("its operations differ from one call to the next with the same input")
            if not leaks(expected, found, tolerances, disturbed):
                continue
            culprit = _first_leak(
                len(keys),
                lambda n, d=disturbed: leaks(expected, run(d, n)[1], tolerances, d),  # type: ignore[misc]
            )
            raise _NoRows(
                first.seen[culprit],
                "its rows of dimension 0 are not the samples' own, or samples are mixed after it",
            )
        self._verified.update(keys)


class _Use:
    """One use of parameters in a forward."""

    def __init__(
        self,
        registered: Registered,
        handles: dict[int, ClusterParameter],
        layout: BatchLayout,
        engine: GroupedEngine,
        recomputed: bool,
    ) -> None:
        self.registered, self.handles, self.layout, self.engine = registered, handles, layout, engine
        self.recomputed = recomputed
        self.distinct = len({id(handle) for handle in handles.values()}) == len(handles)


class _Apply(torch.autograd.Function):
    """An operation run by its rule."""

    @staticmethod
    def forward(ctx: Any, use: _Use, *values: Any) -> Tensor:
        context = RuleContext()
        out = _run_forward(use.registered, context, list(values), use.handles)
        ctx.save_for_backward(*context.to_save)
        context.to_save = ()
        ctx.use, ctx.context = use, context
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        use, context, receiver = ctx.use, ctx.context, ctx.use.engine.receiver
        store = receiver.store
        if use.recomputed and store is not None:
            use.engine.refuse_ambiguity()
        context.saved_tensors = ctx.saved_tensors
        context.needs_input_grad = ctx.needs_input_grad[1:]

        def buffer(position: int) -> Tensor | None:
            handle = use.handles.get(position)
            if store is None or handle is None or handle.source is not None:
                return None
            if not use.distinct:  # one block can't hold the gradients of two arguments
                return None
            block = store.vacant(handle.origins[0])
            return block if block is not None and block.is_contiguous() else None

        clusters = use.layout.whole if store is None else use.layout.clusters
        with _no_autocast(grad.device.type):
            gradients = list(_run_backward(use, context, grad, clusters, buffer))
        receiver.bypassed = receiver.bypassed or store is None
        later = set() if store is None else _left_for_later(use, context, grad, store)
        for position, handle in use.handles.items():
            found = gradients[position]
            if found is None:
                continue
            if store is None:
                gradients[position] = found[0]
            else:
                use.engine.deliver(handle, found)
                gradients[position] = None
        if later and store is not None:
            store.defer(_deferred_part(use, context, grad, later))
        context.saved_tensors = ()
        return None, *gradients


# What `Function.apply` comes to after it has looked for transforms of torch.func, at a third of the time.
_apply_node = super(torch.autograd.Function, _Apply).apply


def _left_for_later(use: _Use, context: RuleContext, grad: Tensor, store: Store) -> set[int]:
    """Return the parameters whose update is formed from the operation's tensors, once w is known."""
    if not store.defers:
        return set()
    parameters = {p.data_ptr() for p in use.engine.parameters}
    tensors = [t for t in (grad, *context.saved_tensors) if t is not None and t.data_ptr() not in parameters]
    size = sum(t.numel() * t.element_size() for t in tensors)
    wanted = [handle for i, handle in use.handles.items() if context.needs_input_grad[i]]
    return {o for handle in wanted for o in handle.origins if not store.keeps(o, size)}


def _deferred_part(
    use: _Use, context: RuleContext, grad: Tensor, later: set[int]
) -> Callable[[Tensor], None]:
    """Return what forms the update of some parameters from the operation's saved tensors and output gradient."""
    kept = copy.copy(context)
    kept.needs_input_grad = tuple(
        i in use.handles and not later.isdisjoint(use.handles[i].origins)
        for i in range(len(context.needs_input_grad))
    )
    parameters = use.engine.parameters

    def form(weights: Tensor) -> None:
        fresh: dict[int, Tensor] = {}  # .grad made here, and not yet filled

        def buffer(position: int) -> Tensor | None:
            handle = use.handles.get(position)
            if handle is None or handle.source is not None or parameters[handle.origins[0]].grad is not None:
                return None
            parameter = parameters[handle.origins[0]]
            parameter.grad = torch.empty_like(parameter)
            fresh[handle.origins[0]] = block = parameter.grad.unsqueeze(0)
            return block if block.is_contiguous() else None

        by_row = use.layout.clusters.by_row(weights, grad.shape[0])
        weighted = (grad * by_row.view(-1, *[1] * (grad.dim() - 1))).to(grad.dtype)
        with torch.no_grad(), _no_autocast(grad.device.type):
            gradients = _run_backward(use, kept, weighted, use.layout.whole, buffer)
            for position, handle in use.handles.items():
                found = gradients[position]
                if found is None:
                    continue
                parts = [found] if handle.source is None else pull_back(handle, found, parameters)
                for origin, part in zip(handle.origins, parts, strict=True):
                    if origin not in later:
                        continue
                    _accumulate(parameters[origin], part, fresh.pop(origin, None))

    return form


def _accumulate(parameter: nn.Parameter, part: Tensor, fresh: Tensor | None) -> None:
    """Add a gradient [1, *shape] to a parameter's .grad; `fresh` is the view of it if it is not filled yet."""
    if part is fresh:
        return
    if fresh is not None:
        fresh.copy_(part)
    elif parameter.grad is None:
        parameter.grad = torch.empty_like(parameter).copy_(part[0])
    else:
        parameter.grad.add_(part[0])


def _run_backward(
    use: _Use,
    context: RuleContext,
    grad: Tensor,
    clusters: Clusters,
    buffer: Callable[[int], Tensor | None],
) -> tuple[Tensor | None, ...]:
    context._buffers = buffer
    try:
        gradients = use.registered.rule.backward(context, grad, clusters)
    finally:
        context._buffers = _no_buffer
    wanted = {i: handle for i, handle in use.handles.items() if context.needs_input_grad[i]}
    use.registered.check_gradients(
        gradients, {i: (clusters.num, *handle.value.shape) for i, handle in wanted.items()}
    )
    return gradients


def _run_forward(
    registered: Registered, context: RuleContext, values: list[Any], handles: dict[int, ClusterParameter]
) -> Tensor:
    """Run a rule's forward with the parameters cast as its other arguments are."""
    rule = registered.rule
    for position in handles:
        values[position] = rule.precision(values[position])
    with _no_autocast(values[0].device.type):
        return rule.forward(context, *values)


def _shape_per_sample(batch: Tensor | int, batch_size: int) -> tuple[float, ...]:
    if isinstance(batch, int):
        return (batch / batch_size,)
    return (batch.shape[0] / batch_size, *batch.shape[1:]) if batch.dim() else ()


def _packs_activations() -> bool:
    """Tell whether saved tensors are packed, as non-reentrant checkpoints and offloading do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _nothing(tensor: Tensor) -> None:
    return None


def _refuse_saved(nothing: None) -> Tensor:
    raise _Differentiated("the forward of the model differentiates")


def _no_buffer(position: int) -> None:
    return None


def _no_autocast(device: str) -> Any:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _value(handle: ClusterParameter) -> Tensor:
    return handle.value


def _plain(tensor: Tensor) -> Tensor:
    return tensor.value if isinstance(tensor, ClusterParameter) else tensor


def _lacks_rows(parameter: Tensor, dims: int) -> bool:
    """Tell whether a parameter broadcasts over dimension 0 of a batch with so many dimensions."""
    return parameter.dim() < dims or (parameter.dim() == dims > 0 and parameter.shape[0] == 1)


def _has_tensor(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.requires_grad
    return isinstance(result, tuple | list) and any(_has_tensor(item) for item in result)


def _first_leak(operations: int, leaks: Callable[[int], bool]) -> int:
    """Return the index of the operation whose noise is the first to leak, by bisection."""
    low, high = 0, operations
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if leaks(middle) else (middle, high)
    return low
