"""Checks that cluster gradients of a model are exact: before batches of a new kind, and by spot checks later."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .._torch import dynamo
from .batch import BatchLayout
from .grouped import CannotGroup
from .independence import agree, interact, is_measured, mixing_module, revealing
from .model_state import ModelState, drawing_module, evaluating
from .parameters import grads_set_aside, installed, module_name, raising_module, take_gradients
from .rules import WrongRule
from .step import Step
from .trees import copied, flags, flatten, map_tensors

if TYPE_CHECKING:
    from .engine import Engine

_logger = logging.getLogger("diffmtl_fast")
_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

#: Batches of so many sizes are checked before the first step with them; sizes that come later are not.
MAX_BATCH_SIZES = 16
#: So many whole checks in all: shapes that change with every batch must not be checked with every batch.
MAX_CHECKS = 64
#: After so many steps, and then every so many, a spot check follows. It costs three forwards, about a plain step:
#: a thousandth of training, and three steps more.
SPOT_CHECKS = (16, 64, 256)
SPOT_CHECK_EVERY = 1024


class ModelCheck:
    """Makes sure that the engine's gradients are those of the clusters, or refuses the model by name.

    Args:
        engine: the engine whose model is checked.

    Attributes:
        writes: whether the model writes its own parameters in its forward.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sizes: dict[
            tuple[Any, ...], set[int]
        ] = {}  # of the batches that were checked, by the rest of the kind
        self._steps = 0  # since the last whole check
        self._spots = 0  # checks so far
        self._checks = 0  # whole ones so far
        self._checked_at = 0  # the step of the last check of any kind
        self._differentiates = False  # whether the model forms gradients in its forward
        self.writes = False

    def before(self, layout: BatchLayout, given: _Arguments, ordered: _Arguments) -> None:
        """Check the model before a batch, if it is of a new kind or the time has come.

        Args:
            layout: of the batch.
            given: the model's arguments as they were given.
            ordered: the same, sorted by cluster.

        Raises:
            CannotGroup: slices of the whole model may be exact, grouping is not.
            ValueError: the model can't be trained by cluster.
            RuntimeError: it can't be run by cluster.
        """
        sizes = self._sizes.setdefault(self._kind(layout, given), set())
        # Compiled code is traced for shapes, by which it tells batches from constants: all of them are checked.
        enough = len(sizes) >= MAX_BATCH_SIZES or self._checks >= MAX_CHECKS
        if layout.batch_size in sizes or (enough and self._engine.compiled is None):
            self._steps += 1
            if self._steps in SPOT_CHECKS or self._steps % SPOT_CHECK_EVERY == 0:
                self._spot_check(layout, ordered)
            return
        self.again(layout, given, ordered)
        sizes.add(layout.batch_size)

    def again(self, layout: BatchLayout, given: _Arguments, ordered: _Arguments) -> None:
        """Check the model, whether or not a batch of this kind was checked before; see `before`."""
        began = time.perf_counter()
        self._check(layout, given, ordered)
        _logger.info(
            "ClusteredMTL: checked the model on a batch of %d samples in %.1f s",
            layout.batch_size,
            time.perf_counter() - began,
        )
        self._checks += 1
        self._steps = self._checked_at = 0

    def _kind(self, layout: BatchLayout, given: _Arguments) -> tuple[Any, ...]:
        """Name what a check holds for, beside the size of the batch."""
        shapes = [
            tuple(leaf.shape[1:] if leaf.dim() and leaf.shape[0] == layout.batch_size else leaf.shape)
            for leaf in flatten(given)[0]
            if isinstance(leaf, Tensor)
        ]
        engine = self._engine
        return (
            engine.grouped is not None,
            engine.compiled is not None,
            layout.order is None,
            engine.training,
            flags(*given),
            *shapes,
        )

    def _check(self, layout: BatchLayout, given: _Arguments, ordered: _Arguments) -> None:
        grouped = self._engine.grouped
        if self._engine.compiled is not None:
            self._check_compiled(layout, given, ordered)
            return
        if grouped is None:
            if layout.batch_size > 1:
                self._check_slices(layout, given, ordered)
            self._check_gradients(layout, ordered)
            return
        with self._without_consequences(given):
            pass  # a model that fails by itself does so here
        if layout.batch_size > 1 and layout.order is not None:
            self._check_order(layout, given, ordered)
        try:
            grouped.verify(layout, *ordered)
            self._check_gradients(layout, ordered)
        except (CannotGroup, WrongRule, torch.OutOfMemoryError):
            raise
        except (
            RuntimeError,
            TypeError,
            LookupError,
        ) as error:  # of operations that tensor subclasses can't take
            where = raising_module(self._engine.model, error)
            raise CannotGroup(
                f"{where}: its operations can't be run by cluster as a whole: {error}"
            ) from error

    def _check_compiled(self, layout: BatchLayout, given: _Arguments, ordered: _Arguments) -> None:
        """Check a compiled model as a whole, first without the compiler, then what the compiler makes of it."""
        if self._engine.memory == "lean":
            self._engine.store(Step(by_cluster=True))  # says why not
        if layout.batch_size > 1:
            with self._without_consequences(given) as state:
                self._refuse_interaction(layout, given, state)
        if layout.batch_size > 1 and layout.order is not None:
            self._check_order(layout, given, ordered)
        assert self._engine.compiled is not None
        self._engine.compiled.learn()
        try:
            self._check_gradients(
                layout, ordered
            )  # finds operations without a rule, and says so in plain words
            self._check_gradients(layout, ordered, compiled=True)
        except (CannotGroup, WrongRule, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, LookupError, ValueError, AttributeError) as error:
            raise CannotGroup(f"its operations can't be run by cluster as a whole: {error}") from error

    def _spot_check(self, layout: BatchLayout, ordered: _Arguments) -> None:
        """Look again whether samples have an effect on each other.

        Raises:
            ValueError: they do.
        """
        if layout.batch_size == 1:
            return
        grouped = self._engine.grouped
        steps, self._checked_at = self._steps - self._checked_at, self._steps
        some = torch.randperm(layout.batch_size, generator=torch.Generator().manual_seed(self._spots))
        half = torch.zeros(layout.batch_size, dtype=torch.bool)
        half[some[: (layout.batch_size + 1) // 2]] = True
        self._spots += 1
        if grouped is not None:
            found = grouped.spot_check(layout, *ordered, half)
        else:
            with self._without_consequences(ordered) as state:
                found = self._mixing(layout, ordered, state, [half])
        if found is not None:
            raise ValueError(
                "model: expected each sample's output to depend on that sample alone, as was found before, found "
                f"that samples are mixed since: {found}; the last check that found none was {steps} steps ago, "
                "and the steps since then may have been wrong"
            )

    # Samples that have an effect on each other, and arguments that only look like the samples'.

    def _check_order(self, layout: BatchLayout, given: _Arguments, ordered: _Arguments) -> None:
        """Refuse arguments that are not the samples' although they look it, where the samples are put in order."""
        with self._without_consequences(given) as state:
            self._refuse_interaction(layout, given, state)
            whole, parts, drawn = self._twice(state, given, lambda: layout.unsort(self._call(ordered)))
        if not agree(whole, parts, max(state.eps, self._engine.eps)):
            self._refuse_random(drawn, "sort the batch by cluster")
            raise ValueError(
                "model: expected arguments with a row for every sample, found another output when the samples are "
                "put in the order of their clusters; pass lists as tensors, or sort the batch by cluster"
            )

    def _check_slices(self, layout: BatchLayout, given: _Arguments, ordered: _Arguments) -> None:
        """Refuse a model whose samples have an effect on each other, or that slices would change."""
        engine = self._engine
        with self._without_consequences(given) as state:
            self._refuse_interaction(layout, given, state)
            if changed := state.changed():
                where = module_name(engine.model, changed[0].module)
                raise ValueError(
                    f"model: expected buffers that a forward leaves as they are, found '{changed[0].name}' of "
                    f"'{where}' updated; slices would update it once per cluster"
                )
            self.writes = state.writes
            same: Any = [[revealing(p) for p in engine.parameters]] * engine.num_clusters
            slices = lambda: self._unsorted_slices(layout, ordered, same)  # noqa: E731
            whole, parts, drawn = self._twice(state, given, slices)
        if not agree(whole, parts, max(state.eps, self._engine.eps)):
            self._refuse_random(drawn, "the grouped engine can run it on a batch that is sorted by cluster")
            raise ValueError(
                "model: expected each sample's output to depend on that sample alone, found that slices of the "
                "batch give another output than the whole batch"
            )

    def _unsorted_slices(self, layout: BatchLayout, ordered: _Arguments, stand_ins: Any) -> Any:
        with torch.set_grad_enabled(self._differentiates):
            output = self._engine.run_slices(layout, map_tensors(copied, ordered), stand_ins)
        return map_tensors(Tensor.detach, layout.unsort(output))

    def _twice(self, state: ModelState, given: _Arguments, other: Any) -> tuple[Any, Any, str | None]:
        """Call the model, and the same in another way, in evaluation mode; and who draws random numbers in it."""
        model = self._engine.model
        with evaluating(model):
            state.restore()
            whole = self._call(given)
            drawn = None
            if state.drawn:
                state.restore()
                drawn = drawing_module(model, lambda: self._call(given))
            state.restore()
            try:
                return whole, other(), drawn
            except (RuntimeError, IndexError) as error:
                where = raising_module(model, error)
                raise ValueError(
                    f"model: expected a forward that works with any number of samples, found an error in "
                    f"'{where}' on a part of the batch, or on the samples in another order (a parameter or an "
                    f"argument with a row for every sample?): {error}"
                ) from error

    def _refuse_random(self, drawn: str | None, advice: str) -> None:
        if drawn is not None:
            raise ValueError(
                f"model: expected a forward without random numbers in evaluation mode, found some drawn by "
                f"'{drawn}', so that another order of the samples can't be compared; {advice}"
            )

    def _refuse_interaction(self, layout: BatchLayout, given: _Arguments, state: ModelState) -> None:
        found = self._mixing(layout, given, state)
        if found is not None:
            raise ValueError(
                "model: expected each sample's output to depend on that sample's rows of the arguments alone, "
                f"found that others' rows change it, first in {found}; samples are mixed, or an argument that "
                "belongs to the whole batch (name it in shared=) has as many rows as there are samples"
            )

    def _mixing(
        self, layout: BatchLayout, given: _Arguments, state: ModelState, sets: Sequence[Tensor] | None = None
    ) -> str | None:
        """Return the name of the first module in which samples have an effect on each other, if they do."""
        engine = self._engine
        call = lambda args, kwargs: self._call((args, kwargs))  # noqa: E731
        options: Any = {"shared": engine.shared, "sets": sets}
        try:
            if not interact(call, *given, layout.batch_size, state, **options):
                return None
        except (RuntimeError, LookupError) as error:
            where = raising_module(engine.model, error)
            raise ValueError(
                f"model: expected a forward that works when samples exchange their arguments, found an error in "
                f"'{where}' (an argument of the whole batch that has as many rows as there are samples? Name it "
                f"in shared=): {error}"
            ) from error
        return f"'{mixing_module(engine.model, call, *given, layout.batch_size, state, **options)}'"

    def _call(self, given: _Arguments) -> Any:
        """Call the model for an output that nobody differentiates."""
        args, kwargs = map_tensors(copied, given)
        with torch.set_grad_enabled(self._differentiates):
            return map_tensors(Tensor.detach, self._engine.model(*args, **kwargs))

    @contextmanager
    def _without_consequences(self, given: _Arguments) -> Iterator[ModelState]:
        """Run the model without consequences; yields its state after a first forward, which may fill buffers."""
        engine, before = self._engine, ModelState(self._engine.model)
        values = [revealing(p) for p in engine.parameters]
        try:
            with (
                _quietly(),
                torch.no_grad(),
                installed(engine.slots, values),
                before.watching(engine.parameters),
            ):
                try:
                    self._call(given)
                except RuntimeError:  # it may form gradients in its forward, or ask for hooks on them
                    before.restore()
                    self._differentiates = True
                    self._call(given)
                warm = ModelState(engine.model)
                with warm.watching(engine.parameters):
                    yield warm
        finally:
            before.restore()

    # Gradients.

    def _check_gradients(self, layout: BatchLayout, ordered: _Arguments, compiled: bool = False) -> None:
        """Refuse gradients of the clusters that do not add up to the plain model's.

        With any weights w, Σ_k w_k g_k is the gradient of the loss whose samples are weighted by their cluster's
        w_k. A loss is made up, and both are formed: one by the engine and the store of the steps to come, one by
        a plain backward. That finds whatever the other checks can't see: gradients that go astray, that are no
        sums over samples, that are formed by a wrong rule, or that a step would overwrite.
        """
        engine, state = self._engine, ModelState(self._engine.model)
        weights = torch.linspace(0.5, 1.5, engine.num_clusters, device=engine.parameters[0].device)
        values = [revealing(p) for p in engine.parameters]
        with _quietly(), grads_set_aside(engine.parameters):
            try:
                with state.watching(engine.parameters):
                    expected, mode = self._expected(layout, ordered, values, weights, state, compiled)
                    if expected is None:
                        return
                    if not compiled:
                        with mode:
                            found = self._by_cluster(layout, ordered, values, weights)
                if compiled:  # beside what watches, which would be compiled, too
                    with mode, _stance("default"):
                        found = self._by_cluster(layout, ordered, values, weights)
            finally:
                state.restore()
        eps, scale = max(engine.eps, state.eps), _mean_size(expected)
        wrong = [
            name
            for name, a, b in zip(engine.names, expected, found, strict=True)
            if not _near(a, b, scale, eps)
        ]
        if wrong and (engine.grouped is not None or engine.compiled is not None):
            raise CannotGroup(
                f"{', '.join(wrong)}: gradients formed by cluster do not add up to the plain ones"
            )
        if wrong:
            raise ValueError(
                f"model: expected gradients that are sums over the samples, found that those of {wrong}, formed "
                "by cluster, do not add up to the plain ones (scaled by frequencies in the batch, or normalised "
                "over it?)"
            )

    def _expected(
        self,
        layout: BatchLayout,
        ordered: _Arguments,
        values: Sequence[Tensor],
        weights: Tensor,
        state: ModelState,
        compiled: bool,
    ) -> tuple[list[Tensor | None] | None, Any]:
        """Return the plain model's gradients of the weighted loss, and the mode in which they can be compared."""
        mode: Any = nullcontext()
        expected = self._plain(layout, ordered, values, weights)
        if state.drawn and (compiled or self._in_slices):
            state.restore()  # slices and compiled code draw other numbers than the model
            mode = evaluating(self._engine.model)
            with evaluating(self._engine.model):
                expected = self._plain(layout, ordered, values, weights)
        self.writes = self.writes or state.writes
        state.restore()
        return expected, mode

    @property
    def _in_slices(self) -> bool:
        """Whether a part of the model, or all of it, runs in slices."""
        engine = self._engine
        return bool(engine.grouped.slices.reasons) if engine.grouped is not None else engine.compiled is None

    def _plain(
        self, layout: BatchLayout, ordered: _Arguments, values: Sequence[Tensor], weights: Tensor
    ) -> list[Tensor | None] | None:
        """Return the plain model's gradients of the weighted loss; None where it has none."""
        engine = self._engine
        with torch.enable_grad(), installed(engine.slots, values):
            args, kwargs = map_tensors(copied, ordered)
            objective = _made_up_loss(engine.model(*args, **kwargs), layout, weights)
            if objective is None:
                return None
            try:
                with _no_autocast(objective):
                    objective.backward()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # an output that can't be differentiated, and that no loss may need
                _logger.warning("ClusteredMTL: could not check the gradients of the clusters: %s", error)
                return None
        return take_gradients(values, engine.parameters)

    def _by_cluster(
        self, layout: BatchLayout, ordered: _Arguments, values: Sequence[Tensor], weights: Tensor
    ) -> list[Tensor | None]:
        """Return the same gradients as the engine forms them."""
        engine, step = self._engine, Step(by_cluster=True)
        with torch.enable_grad(), engine.standing_for(values):
            output = engine.run(step, layout, map_tensors(copied, ordered))
            objective = _made_up_loss(output, layout, None)
            if objective is None:
                raise CannotGroup("no output that a loss can be of has a gradient")
            store = engine.spare_store(step)
            with _no_autocast(objective):
                engine.collect(step, objective, store)
                gramian = store.gramian()
                store.update(weights.to(gramian.dtype), lambda w: self._again(output, layout, w))
        return take_gradients(values, engine.parameters)

    def _again(self, output: Any, layout: BatchLayout, weights: Tensor) -> None:
        objective = _made_up_loss(output, layout, weights)
        assert objective is not None
        with self._engine.during_backward():
            objective.backward(inputs=self._engine.leaves)


def _made_up_loss(output: Any, layout: BatchLayout, weights: Tensor | None) -> Tensor | None:
    """Return a sum of losses of every sample, weighted by cluster; None where no output has a gradient."""
    total: Tensor | None = None
    for leaf in flatten(output)[0]:
        if not is_measured(leaf) or not leaf.requires_grad or not leaf.numel():
            continue
        if leaf.dim() == 0 or leaf.shape[0] != layout.batch_size:
            continue
        rows = (torch.view_as_real(leaf) if leaf.is_complex() else leaf).reshape(layout.batch_size, -1)
        rows = rows.float() if rows.dtype.itemsize < 4 else rows
        slopes = torch.cos(torch.arange(rows.numel(), device=rows.device) * 1.7 + 0.3).view(rows.shape)
        losses = (rows * slopes.to(rows.dtype)).mean(1)
        if weights is not None:
            losses = losses * layout.clusters.by_row(weights, layout.batch_size).to(losses)
        total = losses.sum() if total is None else total + losses.sum()
    return total


def _near(a: Tensor | None, b: Tensor | None, scale: Tensor, eps: float) -> bool:
    """Compare a parameter's gradients by half of the digits, of their size and of the mean parameter's."""
    if a is None or b is None:
        there = b if a is None else a
        return there is None or _near(there, torch.zeros_like(there), scale, eps)
    size, difference = a.norm().double(), (a - b.to(a.dtype)).norm().double()
    if not bool(size.isfinite()):  # nothing can be said
        return True
    return bool(difference <= 4 * eps**0.5 * (size + scale))


def _mean_size(gradients: Sequence[Tensor | None]) -> Tensor:
    sizes = [g.norm().double() for g in gradients if g is not None]
    return torch.stack(sizes).nan_to_num(0, 0, 0).square().mean().sqrt() if sizes else torch.zeros(())


def _no_autocast(tensor: Tensor) -> Any:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _stance(name: str) -> Any:
    """Return a context in which the compiler takes this stance."""
    # Without dynamo, slow to import, nothing is compiled.
    return torch.compiler.set_stance(name) if dynamo() is not None else nullcontext()


@contextmanager
def _quietly() -> Iterator[None]:
    """Run models as they are written, and without their warnings, which the real forward will repeat."""
    with warnings.catch_warnings(), _stance("force_eager"):
        warnings.simplefilter("ignore")
        yield
