"""The engine of compiled models: the grouped engine's step as the compiler sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..._host import on_host
from ..._torch import (
    DisableTorchFunctionSubclass,
    at_fixed_address,
    compiled_graphs,
    forget_changes,
    let_compiler_dispatch_rms_norm,
)
from ..batch import BatchLayout, Clusters
from ..parameters import Slot, installed
from ..step import Step
from ..stores import Jacobian, Store
from . import dispatch  # noqa: F401  which runs the operations on stand-ins
from .stand_in import StandIn, batch

# The number of operations that wrote to each block is read back in these steps, which waits for an accelerator.
_READ_BACK = 16
_READ_BACK_EVERY = 1024


class CompiledEngine:
    """Per-cluster gradients from one forward and one backward of a compiled model.

    In the parameters' places the modules find stand-ins, whose operations the compiler traces into graphs that
    write every cluster's gradients straight into the Jacobian: memory of the same address in all steps, which
    graphs are given like any other input. Where clusters begin is an input, too, so that other clusters are no
    reason to compile again. A model that is compiled in parts runs the rest of its operations by the same
    functions, not compiled.

    Nothing here sees samples that mix within the model, or what the compiler makes wrong: the checks of the whole
    model do (see `ModelCheck`), before the first step and whenever something is compiled anew.

    Args:
        model: the model.
        slots: where its modules look its trainable parameters up.
        parameters: the parameters.
        names: their names, for messages.

    Attributes:
        values: what the stand-ins stand for: the parameters, or in checks other values of them.
        compiled_anew: whether the compiler has made graphs in the last forward, which no check has seen.
        shared: parameters of which several operations write to the block.
    """

    def __init__(
        self, model: nn.Module, slots: list[Slot], parameters: list[nn.Parameter], names: list[str]
    ) -> None:
        let_compiler_dispatch_rms_norm()
        self.model, self.slots, self.parameters, self.names = model, slots, parameters, names
        self.values: Sequence[Tensor] = parameters
        self._learning = False  # whether the next check tells how often each parameter is used
        self.shared: set[int] = set()
        self.compiled_anew = False
        # Of the first forward that shares a backward, of the second, ...
        self._passes: list[list[StandIn]] = []
        self._step: Step | None = None
        self._written = False  # whether shared blocks may hold gradients that have been delivered
        self._arrived: list[tuple[int, int, Tensor]] = []
        self._steps = 0

    def forward(
        self,
        layout: BatchLayout,
        step: Step,
        jacobian: Jacobian,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the model on a sorted batch.

        Args:
            layout: the order of the batch.
            step: the step that the forward belongs to.
            jacobian: whose blocks the backward writes to, if this is the step's first forward.
            args: positional arguments.
            kwargs: keyword arguments.
        """
        number = step.begin_pass(layout.clusters).number
        self._step = step
        graphs = compiled_graphs()
        with self._installed(self.prepare(number, jacobian), layout.clusters):
            output = self.model(*args, **kwargs)
        self.compiled_anew = compiled_graphs() != graphs
        return output

    def prepare(self, number: int, jacobian: Jacobian) -> list[StandIn]:
        """Return the stand-ins of one of the forwards that share a backward; each writes to memory of its own.

        What several operations write to is set to zero.
        """
        if len(self._passes) == number:
            blocks = [torch.empty_like(b) for b in jacobian.blocks] if number else jacobian.blocks
            made = [StandIn.make(v, b, False) for v, b in zip(self.values, blocks, strict=True)]
            for position, stand_in in enumerate(made):
                hook = self._arrive(number, position, stand_in)
                stand_in.anchor.register_post_accumulate_grad_hook(hook)
                with DisableTorchFunctionSubclass():
                    stand_in.register_post_accumulate_grad_hook(self._refuse_gradient(position))
            self._passes.append(made)
        found = self._passes[number]
        for position, stand_in in enumerate(found):
            if number == 0 and stand_in.block is not jacobian.blocks[position]:
                stand_in.block = at_fixed_address(jacobian.blocks[position])
            stand_in.accumulate = position in self.shared
            if stand_in.accumulate:
                stand_in.block.zero_()
        self._forget_changes()
        return found

    def _arrive(self, number: int, position: int, stand_in: StandIn) -> Callable[[Tensor], None]:
        def hook(anchor: Tensor) -> None:
            count, anchor.grad = anchor.grad, None
            assert count is not None
            assert self._step is not None
            if self._step.store is None:
                if on_host(count) and not stand_in.accumulate and float(count) != 1:
                    raise self._overwritten([self.names[position]])
                self._bypass(position, stand_in)
            else:
                self._arrived.append((number, position, count))

        return hook

    def _bypass(self, position: int, stand_in: StandIn) -> None:
        """Do what the plain model's backward would."""
        assert self._step is not None
        self._step.bypassed = True
        parameter = self.values[position]
        with torch.no_grad():
            gradient = stand_in.block.sum(0, dtype=parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            if stand_in.accumulate:
                stand_in.block.zero_()

    def _refuse_gradient(self, position: int) -> Callable[[Tensor], None]:
        def hook(stand_in: Tensor) -> None:
            raise RuntimeError(
                f"model: expected operations that tensor subclasses see, found a gradient of "
                f"'{self.names[position]}' from one that they do not see (a torch.autograd.Function or C++ that "
                "takes the parameter itself); use engine='sliced'"
            )

        return hook

    def deliver(self, store: Store) -> None:
        """Hand the gradients of a backward that is over to a store.

        Raises:
            RuntimeError: operations wrote over each other's gradients.
        """
        arrived, self._arrived = sorted(self._arrived, key=lambda each: each[:2]), []
        self._written = True
        self._refuse_overwritten(arrived)
        for number, position, _ in arrived:  # those that are in the store's own memory first
            store.add(position, self._passes[number][position].block)

    def _refuse_overwritten(self, arrived: list[tuple[int, int, Tensor]]) -> None:
        self._steps += 1
        alone = [each for each in arrived if each[1] not in self.shared]
        read = self._steps <= _READ_BACK or self._steps % _READ_BACK_EVERY == 0
        if not alone or not (read or on_host(self.parameters[0])):
            return
        counts = torch.stack([count for _, _, count in alone]).tolist()
        wrong = [self.names[p] for (_, p, _), count in zip(alone, counts, strict=True) if count != 1]
        if wrong:
            raise self._overwritten(wrong)

    def _overwritten(self, names: list[str]) -> RuntimeError:
        return RuntimeError(
            f"model: expected operations as in the check of the model, found several on {names} in one forward, "
            "where there was one; call it so in the first step, or use engine='sliced'"
        )

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Let checkpoints outside of compiled code find the stand-ins; where several forwards share it, none."""
        self._arrived.clear()  # a backward that failed may have left some
        for each in [] if self._step is None else self._step.passes:
            for position in self.shared:  # a check since the forward may have used the same memory
                self._passes[each.number][position].block.zero_()
        self._forget_changes()
        if self._step is None or len(self._step.passes) != 1:
            yield
            return
        (only,) = self._step.passes
        with self._installed(self._passes[only.number], only.clusters):
            yield

    @contextmanager
    def _installed(self, stand_ins: list[StandIn], clusters: Clusters) -> Iterator[None]:
        batch.set(clusters, self.parameters[0].device)
        with installed(self.slots, stand_ins):
            yield

    def begin_other_backward(self, jacobian: Jacobian) -> None:
        """Let a backward other than `ClusteredMTL.backward` find the shared blocks empty, as it leaves them.

        Args:
            jacobian: that the first of the forwards sharing a backward writes to.
        """
        self._forget_changes()
        if not self._written:
            return
        self._written = False
        others = [[stand_in.block for stand_in in made] for made in self._passes[1:]]
        for blocks in (jacobian.blocks, *others):
            for position in self.shared:
                blocks[position].zero_()
        self._forget_changes()

    def _forget_changes(self) -> None:
        """Let graphs that have saved blocks, to write to them, not mind that others have done so since."""
        forget_changes([stand_in.block for made in self._passes for stand_in in made])

    def release(self) -> None:
        """Give the memory of all forwards back."""
        self._passes = []

    def learn(self) -> None:
        """Find out in the next check, which is not compiled, how often each parameter is used."""
        self._learning = True

    @contextmanager
    def standing_for(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the stand-ins stand for other values of the parameters."""
        before = self.values, self._passes, self._step
        self.values, self._passes = values, []
        shared = self.shared
        if self._learning:  # all operations add to their blocks
            self.shared = set(range(len(values)))
        try:
            yield
        finally:
            used = {i for made in self._passes for i, stand_in in enumerate(made) if stand_in.uses > 1}
            self.values, self._passes, self._step = before
            self.shared, self._learning = shared | used, False
            self._written = True
