"""`gramian_weights`: the weights of every method that needs the Gramian alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._checks import check_present, check_same_device, check_square
from ._gramians import UnitGramian, as_weights, finite_unit_gramian
from ._library import call, define_op, refuse_autograd

#: The definition of each method, weigh(unit, number, ridge, *settings) → w, float64 [K]: see
#: `weighting._from_gramian`, where the weightings enter themselves.
DEFINITIONS: dict[str, Callable[..., Tensor]] = {}


def gramian_weights_plain(
    gramian: Tensor, present: Tensor | None, method: str, settings: Sequence[float]
) -> Tensor:
    """Compute `gramian_weights` by the definition of the method."""
    weigh, k = DEFINITIONS[method], gramian.shape[0]
    expected = len(inspect.signature(weigh).parameters) - 3
    if len(settings) != expected:
        raise ValueError(f"settings: expected {expected} for {method}, found {len(settings)}")
    present = torch.ones(k, dtype=torch.bool, device=gramian.device) if present is None else present
    unit: UnitGramian = finite_unit_gramian(gramian, present)
    ridge = 4 * k * torch.finfo(gramian.dtype).eps
    return as_weights(weigh(unit, present.sum(), ridge, *settings), unit, gramian.dtype)


_gramian_weights = define_op(
    "gramian_weights(Tensor gramian, Tensor? present, str method, float[] settings) -> Tensor",
    plain=gramian_weights_plain,
    fake=lambda gramian, present, method, settings: gramian.new_empty(gramian.shape[:1]),
)
refuse_autograd("gramian_weights", "its weights are constants of the update; detach the Gramian")


def gramian_weights(
    gramian: Tensor, method: str, settings: Sequence[float] = (), present: Tensor | None = None
) -> Tensor:
    """The weights of a method that needs the Gramian alone, such as `diffmtl_fast.UPGrad`.

    Args:
        gramian: G, [K, K], floating point, symmetric positive semidefinite, in the dtype its sums were formed in:
            that dtype's rounding decides how far G can be trusted.
        present: bool [K]; an absent cluster takes no part, whatever stands in its row and column of G. Default:
            all present.
        method: the name of a class of `diffmtl_fast.weighting`; its docstring has the formula and the source.
        settings: the numbers that the class is made with, in its order.

    Returns:
        w, [K], in the dtype of G (computed in float64, right for gradients of any scale whose Gramian that dtype
        can hold). 0 for an absent cluster, and for one whose gradient is zero, which has nothing to weigh. NaN
        everywhere where G is not finite for the present clusters.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: a shape or device does not fit, there is no such method, or it has another number of settings.
    """
    check_square("gramian", gramian)
    if present is not None:
        check_present(present, gramian.shape[0])
        check_same_device(gramian=gramian, present=present)
    if method not in DEFINITIONS:
        raise ValueError(f"method: expected one of {', '.join(sorted(DEFINITIONS))}, found {method!r}")
    return call(_gramian_weights, "gramian_weights", gramian, present, method, settings)
