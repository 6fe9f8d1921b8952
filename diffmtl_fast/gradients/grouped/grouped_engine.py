"""The grouped engine: the whole batch at once; only the parameters' gradients are formed cluster by cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..._torch import own_buffers
from ..batch import BatchLayout
from ..model_state import ModelState
from ..parameters import Slot, forwards_replaced, installed
from ..step import Pass, Step
from ..trees import flatten
from .cluster_parameter import ClusterParameter
from .dispatch import Dispatch
from .module_slices import ModuleSlices
from .noise_check import Probe, Verification
from .operation import CannotGroup, NoRows, Unverified
from .own_functions import Function, seen


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
        names: their names, for messages.

    Attributes:
        device: the type of the parameters' device.
        values: what the handles stand for: the parameters, or in checks other values of them.
        verified: the operations that a check has found to be exact.
        constant: operations on tensors that are no batch, and how that was found out.
        functions: that are applied to parameters.
        layout: of the forward that is running; None outside of one.
        forward_pass: the forward that is running; None in checks.
        probe: while a check's forward is running.
        recomputing: whether a backward is running.
        reentrant: whether a check has met reentrant checkpoints.
    """

    def __init__(
        self, model: nn.Module, slots: list[Slot], parameters: list[nn.Parameter], names: list[str]
    ) -> None:
        self.model, self.slots, self.parameters, self.names = model, slots, parameters, names
        self.device = parameters[0].device.type
        self.values: Sequence[Tensor] = parameters
        self.handles = [ClusterParameter.make(p, (i,), None, self) for i, p in enumerate(parameters)]
        self.dispatch, self.slices, self._verification = (
            Dispatch(self),
            ModuleSlices(self),
            Verification(self),
        )
        self.verified: set[tuple[Any, ...]] = set()
        self.constant: dict[tuple[Any, ...], str] = {}
        self.functions: set[Function] = set()
        self._held: set[int] | None = None
        self._training: tuple[bool, ...] = ()
        self.layout: BatchLayout | None = None
        self.forward_pass: Pass | None = None
        self.probe: Probe | None = None
        self.recomputing = False
        self.reentrant = False
        self._last: tuple[BatchLayout, Pass] | None = None

    def begin(self, training: tuple[bool, ...]) -> None:
        """Start a step, with the modes of all modules."""
        if training != self._training:  # the same operations may now have other effects
            self.verified.clear()
            self._training = training

    def forward(self, layout: BatchLayout, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model on a sorted batch.

        Raises:
            CannotGroup: only slices of the whole model would be exact.
        """
        for _ in range(3 + len(self.slots)):
            state = ModelState(self.model, self._verification.volatile if self.verified else None)
            before = len(step.passes)
            try:
                with self.installed(layout, step.begin_pass(layout.clusters)):
                    return self.refuse_handles(self.model(*args, **kwargs))
            except (NoRows, Unverified):  # before the first operation that no check has seen
                del step.passes[before:]
                state.restore()
                self._verification.run(layout, (args, kwargs))
        raise CannotGroup("its operations differ from one call to the next with the same input")

    def verify(self, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check batches like this one as a whole.

        Raises:
            CannotGroup: only slices of the whole model would be exact.
        """
        self._verification.run(layout, (args, kwargs))

    def spot_check(
        self, layout: BatchLayout, args: tuple[Any, ...], kwargs: dict[str, Any], disturbed: Tensor
    ) -> str | None:
        """Check again, at the price of three forwards; returns what mixes samples, if something does."""
        error = self._verification.spot_check(layout, (args, kwargs), disturbed)
        if error is None:
            return None
        names = [name for module, name in self._names().items() if module in error.operation.owners]
        return f"{names}: {error}"

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Let the model see the handles in backward, where checkpoints are recomputed."""
        assert self._last is not None
        self.recomputing = True
        try:
            with self.installed(*self._last):
                yield
        finally:
            self.recomputing = False

    @contextmanager
    def installed(self, layout: BatchLayout, forward_pass: Pass | None) -> Iterator[None]:
        """Let the model see the handles."""
        before = self.layout, self.forward_pass
        self.layout, self.forward_pass, self._held = layout, forward_pass, None
        if forward_pass is not None:
            self._last = layout, forward_pass
        try:
            with (
                installed(self.slots, self.handles),
                forwards_replaced(self.slices.forwards()),
                seen(self.functions),
            ):
                yield
        finally:
            self.layout, self.forward_pass = before

    @contextmanager
    def standing_for(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the handles stand for other values of the parameters."""
        before = self.values
        self._stand_for(values)
        try:
            yield
        finally:
            self._stand_for(before)

    def _stand_for(self, values: Sequence[Tensor]) -> None:
        self.values = values
        self.slices.stand_for(values)
        for handle, value in zip(self.handles, values, strict=True):
            handle.value = value

    def current_step(self) -> Step:
        """Return the step of the last forward."""
        assert self._last is not None
        return self._last[1].step

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a module of the model holds a tensor, which would outlive the forward."""
        if self._held is None:
            found = [v for m in self.model.modules() for v in (*own_buffers(m).values(), *vars(m).values())]
            self._held = {id(value) for value in found if isinstance(value, Tensor)}
        return id(tensor) in self._held

    def owners(self, handles: Iterable[ClusterParameter]) -> list[nn.Module]:
        """Return the modules whose parameters these are, or are computed from."""
        origins = {o for handle in handles for o in handle.origins}
        return list(dict.fromkeys(slot.module for slot in self.slots if slot.position in origins))

    def refuse_handles(self, output: Any) -> Any:
        """Refuse outputs that do not depend on the samples, as far as can be seen."""
        if any(isinstance(leaf, ClusterParameter) for leaf in flatten(output)[0]):
            why = "; ".join(dict.fromkeys(self.constant.values())) or "it is computed from parameters alone"
            raise CannotGroup(f"an output is not one row per sample: {why}")
        return output

    def refuse_unseen(self, handle: ClusterParameter) -> None:
        """Refuse a gradient that came to a handle, where no check saw that it would."""
        raise RuntimeError(
            f"model: expected operations that tensor subclasses see, found a gradient of "
            f"{[self.names[o] for o in handle.origins]} from one that they do not see (a torch.autograd.Function "
            "or C++ that takes the parameter itself); use engine='sliced'"
        )

    def refuse_ambiguity(self, step: Step) -> None:
        """Refuse gradients of a graph made in backward where it is not known for which batch it was made."""
        if len(step.layouts) > 1:
            raise RuntimeError(
                "model: expected one batch per backward with reentrant checkpoints, found forwards of several; "
                "pass use_reentrant=False to checkpoint"
            )

    def describe(self) -> str:
        """Say what does not run as a whole."""
        names = self._names()
        named = [f"{names[module]} in slices ({why})" for module, why in self.slices.reasons.items()]
        return "; ".join(named) or "every parameter has a rule"

    def _names(self) -> dict[nn.Module, str]:
        return {module: name or "the model itself" for name, module in self.model.named_modules()}
