"""Tools of the checks: compare two outputs, and see whether changing some samples changes others' output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .model_state import ModelState
from .trees import flatten, replace_rows


def agree(whole: Any, parts: Any, eps: float = 0.0) -> bool:
    """Tell whether two outputs are the same up to the rounding of different kernels: half of the digits.

    Args:
        whole: one output.
        parts: the other.
        eps: the relative rounding within the model, if it is larger than that of its outputs.
    """
    ours, theirs = flatten(whole)[0], flatten(parts)[0]
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor):
            if not isinstance(b, Tensor) or a.shape != b.shape:
                return False
            if is_measured(a):
                scale = float(torch.nan_to_num(a.abs()).max()) if a.numel() else 0.0
                allowed = 2 * max(torch.finfo(a.dtype).eps, eps) ** 0.5 * scale
                if not bool(_close(a, b, allowed).all()):
                    return False
    return True


def halves(batch_size: int) -> Iterator[Tensor]:
    """Yield sets of samples, bool [B], such that no sample is in all the sets that another one is in.

    So an effect on a wrong sample shows in at least one of them. About log2 B sets suffice: each sample is in
    half of them, and no two are in the same half.
    """
    if batch_size == 1:
        return
    sets = 1
    while math.comb(sets, sets // 2) < batch_size:
        sets += 1
    members = torch.zeros(sets, batch_size, dtype=torch.bool)
    for sample, chosen in enumerate(
        itertools.islice(itertools.combinations(range(sets), sets // 2), batch_size)
    ):
        members[list(chosen), sample] = True
    yield from members


def tolerance(first: Any, second: Any) -> Tensor | None:
    """Return by how much an output may differ for no reason: what two equal forwards differ by, and rounding.

    No sample's arithmetic depends on the others' values, so low precision alone is no reason.
    """
    if not is_measured(first):
        return None
    if not first.numel():
        return torch.zeros(())
    eps = min(torch.finfo(first.dtype).eps, torch.finfo(torch.float32).eps)
    largest, difference = (torch.nan_to_num(t.detach()).abs().max().double() for t in (first, first - second))
    return 16 * eps * largest + 4 * difference


def leaks(
    expected: list[Any],
    found: list[Any],
    tolerances: list[Tensor | None],
    disturbed: Tensor,
    *,
    folded: bool = False,
) -> bool:
    """Tell whether outputs changed in samples that were not disturbed.

    Args:
        expected: the outputs without disturbance.
        found: those with it.
        tolerances: of each of them, see `tolerance`.
        disturbed: bool [B].
        folded: outputs may have several rows per sample.

    Raises:
        ValueError: an output that is not one row per sample depends on the samples.
    """
    batch_size = disturbed.shape[0]
    for before, after, allowed in zip(expected, found, tolerances, strict=True):
        if allowed is None:
            continue
        kept = _close(before.detach(), after.detach(), allowed)
        rows = before.shape[0] if before.dim() else 0
        if rows == 0 or (rows % batch_size if folded else rows != batch_size):
            if not bool(kept.all()):
                raise ValueError(
                    f"model: expected output tensors of one row per sample ([{batch_size}, ...]), "
                    f"found {list(before.shape)}"
                )
            continue
        changed = ~kept.reshape(batch_size, -1).all(1)
        if bool((changed & ~disturbed.to(changed.device)).any()):
            return True
    return False


def interact(
    run: Callable[[Any, Any], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int,
    state: ModelState,
    *,
    shared: Collection[str | int] = (),
    folded: bool = False,
    sets: Sequence[Tensor] | None = None,
) -> bool:
    """Tell whether samples have an effect on each other: whether other arguments for some change others' output.

    Args:
        run: the module, of `args` and `kwargs`.
        args: its positional arguments.
        kwargs: its keyword arguments.
        batch_size: B.
        state: put back before every run.
        shared: arguments that are not the samples'.
        folded: arguments and outputs may have several rows per sample.
        sets: the sets of samples, bool [B], that get others' arguments; default as many as it takes to be sure.

    Raises:
        ValueError: an output that is not one row per sample depends on the samples.
    """

    def outputs(a: Any, k: Any) -> list[Any]:
        state.restore()
        return flatten(run(a, k))[0]

    expected = outputs(args, kwargs)
    tolerances = [tolerance(a, b) for a, b in zip(expected, outputs(args, kwargs), strict=True)]
    following = torch.arange(1, batch_size + 1) % batch_size
    for disturbed in halves(batch_size) if sets is None else sets:
        source = torch.where(disturbed, following, torch.arange(batch_size))
        found = outputs(*replace_rows(args, kwargs, source, shared=shared, folded=folded))
        if leaks(expected, found, tolerances, disturbed, folded=folded):
            return True
    return False


def mixing_module(
    model: nn.Module,
    run: Callable[[Any, Any], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int,
    state: ModelState,
    **options: Any,
) -> str:
    """Return the name of the innermost module that is the first in which samples have an effect on each other.

    The arguments are those of `interact`, which must have found that they do.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module) -> Callable[..., None]:
        calls: list[list[Any]] = []
        number = itertools.count()

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            leaves = flatten(output)[0]
            if quiet:
                calls.append([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
                return
            before = calls[next(number) % len(calls)] if calls else []
            if len(before) == len(leaves) and _leaks_anywhere(before, leaves, disturbed):
                found.append(names[module])

        return hook

    hooks = [module.register_forward_hook(look(module)) for module in names]
    following = torch.arange(1, batch_size + 1) % batch_size
    try:
        quiet, disturbed = True, torch.zeros(batch_size, dtype=torch.bool)
        state.restore()
        run(args, kwargs)
        quiet = False
        for disturbed in halves(batch_size) if options["sets"] is None else options["sets"]:
            source = torch.where(disturbed, following, torch.arange(batch_size))
            state.restore()
            run(*replace_rows(args, kwargs, source, shared=options["shared"]))
            if found:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return (found[0] if found else "") or "the model itself"


def _leaks_anywhere(before: list[Any], after: list[Any], disturbed: Tensor) -> bool:
    """Tell whether a module's outputs changed in undisturbed samples, as far as their shapes tell."""
    size = disturbed.shape[0]
    for a, b in zip(before, after, strict=True):
        if is_measured(a) and a.dim() and a.shape == b.shape and a.shape[0] and a.shape[0] % size == 0:
            allowed = tolerance(a, a)
            assert allowed is not None
            changed = ~_close(a, b.detach(), allowed).reshape(size, -1).all(1)
            if bool((changed & ~disturbed.to(changed.device)).any()):
                return True
    return False


def revealing(parameter: Tensor) -> Tensor:
    """Return a parameter's value for a check: noise where it is all zero and would hide what is before it."""
    value = parameter.detach()
    if not bool(value.any()):
        size = torch.arange(value.numel(), device=value.device, dtype=torch.float32)
        value = (0.05 * torch.cos(size * 1.3 + 0.4)).to(value.dtype).view(value.shape)
    return value.requires_grad_()


def is_measured(output: Any) -> bool:
    """Tell whether an output is a tensor that may differ by rounding."""
    return isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex())


def _close(a: Tensor, b: Tensor, allowed: Tensor | float) -> Tensor:
    """Compare elements; a change to or from NaN is a difference."""
    return (a == b) | ((a - b).abs() <= allowed) | (a.isnan() & b.isnan())
