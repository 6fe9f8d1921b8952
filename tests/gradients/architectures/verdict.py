"""One run of the table: steps of an engine beside one torch.autograd.grad per cluster in float64."""

from __future__ import annotations

import re
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exactness import Given, sample_losses
from torch import Tensor, nn

import diffmtl_fast as dm
from benchmarks.reference import update_direction

from .case import Case, clusters_of

K = 3
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto-lean": {"memory": "lean"},
    "grouped": {"engine": "grouped"},
    "grouped-lean": {"engine": "grouped", "memory": "lean"},
    "sliced": {"engine": "sliced"},
    "compiled": {},
}
ORDERS = ("sorted", "unsorted", "absent", "single")
#: of the norm of the error to the norm of the whole; under autocast besides twice the error of the plain model
TOLERANCES = {"float64": 1e-8, "float32": 2e-4, "bfloat16": 2e-2}
_PACKAGE = str(Path(dm.__file__).parent)


@dataclass(frozen=True)
class Verdict:
    """What came of a run: "exact", "refused", "wrong" or "unclear", and the words for it."""

    kind: str
    words: str = ""

    def meets(self, case: Case, way: str) -> bool:
        """Tell whether it is what the case expects."""
        pattern, may_be_exact = expected(case, way)
        if self.kind == "exact":
            return pattern is None or may_be_exact
        return self.kind == "refused" and pattern is not None and re.search(pattern, self.words) is not None


def expected(case: Case, way: str) -> tuple[str | None, bool]:
    """Return the pattern of the refusal that is expected, and whether an exact run is, too."""
    if case.either is not None:
        return case.either, True
    if case.refused is not None:
        return case.refused, False
    if way == "sliced":
        return case.whole, False
    if way == "compiled":  # grouped by an engine of its own, else in slices
        return case.whole, True
    return (None, True) if way == "auto" else (case.slices, True)


def judge(case: Case, way: str, order: str, precision: str) -> Verdict:
    """Take the steps of a case in one way."""
    model, plain = _build(case), _build(case).double()
    if precision == "float64":
        model = model.double()
    if case.plain is not None:
        case.plain(plain)
    rounded = _build(case) if precision == "bfloat16" else None
    compiled = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    mtl = dm.ClusteredMTL(compiled, K, Given(), **WAYS[way])
    mtl.measure_gramian = True
    for step, size in enumerate(case.sizes):
        if step and case.prepare is not None:
            for prepared in (model, plain, rounded):
                if prepared is not None:
                    case.prepare(prepared)
        cluster = torch.tensor(clusters_of(order, size, K))
        inputs = _inputs(case, size, step)
        exact = _jacobian(case, plain, inputs, cluster, torch.float64, step)
        limit = max(TOLERANCES[precision], case.tolerance)
        if rounded is not None:
            with torch.autocast("cpu", torch.bfloat16):
                near = _jacobian(case, rounded, inputs, cluster, torch.float32, step)
            limit += 2 * float((near.double() - exact).norm() / exact.norm().clamp_min(1e-30))
        model.zero_grad()
        dtype = torch.float64 if precision == "float64" else torch.float32
        try:
            torch.manual_seed(step)
            args, kwargs = _cast(inputs, dtype)
            context = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with context:
                    losses = sample_losses(case.output(mtl(*args, **kwargs, cluster=cluster)))
                mtl.backward(losses)
        except Exception as error:
            return _of_error(error)
        if verdict := _difference(model, mtl, exact, limit):
            return Verdict("wrong", f"step {step}: {verdict}")
    return Verdict("exact")


def _build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without elements, and of what torch deprecates
        return case.build()


def _inputs(case: Case, size: int, step: int) -> Any:
    torch.manual_seed(100 + step)
    return tuple(make(size) for make in case.args), {n: make(size) for n, make in case.kwargs.items()}


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return torch.utils._pytree.tree_map(cast, tree)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _jacobian(
    case: Case, model: nn.Module, inputs: Any, cluster: Tensor, dtype: torch.dtype, step: int
) -> Tensor:
    """Form the gradients of the clusters' mean losses, [K, P], one by one."""
    torch.manual_seed(step)
    args, kwargs = _cast(inputs, dtype)
    losses = sample_losses(case.output(model(*args, **kwargs)))
    trained = _trained(model).values()
    jacobian = []
    for k in range(K):
        chosen = losses[cluster == k]
        loss = chosen.mean() if len(chosen) else 0 * losses.sum()
        gradients = torch.autograd.grad(loss, list(trained), retain_graph=True, allow_unused=True)
        jacobian.append(torch.cat([_flat(g, p) for g, p in zip(gradients, trained, strict=True)]))
    return torch.stack(jacobian)


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    dense = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    return dense.detach().double().flatten()


def _difference(model: nn.Module, mtl: dm.ClusteredMTL, exact: Tensor, limit: float) -> str | None:
    """Describe the largest error of a step, if it is one."""
    assert mtl.last is not None
    gramian = exact @ exact.T
    error = float((mtl.last.gramian.double() - gramian).norm() / gramian.norm().clamp_min(1e-30))
    if not error <= 4 * limit:
        return f"Gramian off by {error:.2g}"
    direction = update_direction(exact, mtl.last.weights.double(), mtl.last.present)
    trained = _trained(model)
    parts = direction.split([p.numel() * (2 if p.is_complex() else 1) for p in trained.values()])
    for (name, parameter), part in zip(trained.items(), parts, strict=True):
        error = float((_flat(parameter.grad, parameter) - part).norm())
        scale = float(part.norm() + exact.norm())
        if not error <= limit * scale:
            return f"gradient of {name} off by {error / scale:.2g}"
    return None


def _of_error(error: Exception) -> Verdict:
    """Tell a refusal from an error that nobody meant: it is raised by our code and says what was expected."""
    words = f"{type(error).__name__}: {error}"
    raised = traceback.extract_tb(error.__traceback__)[-1]
    ours = raised.filename.startswith(_PACKAGE)
    said = isinstance(error, ValueError | RuntimeError | TypeError) and (
        "expected" in words or "engine='grouped':" in words
    )
    if ours and said:
        return Verdict("refused", words)
    return Verdict("unclear", f"{words} ({Path(raised.filename).name}:{raised.lineno})")
