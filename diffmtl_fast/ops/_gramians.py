"""What the ops that take a Gramian have in common: which clusters count, and the Gramian of their unit vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class UnitGramian(NamedTuple):
    """A Gramian without the gradients' norms, in float64: right for any norms that its dtype can hold.

    Attributes:
        cosines: [K, K], with a diagonal of ones; of a cluster that is not active the row of the identity.
        norms: [K], the gradients' norms; 1 for a cluster that is not active.
        active: bool [K], the present clusters whose gradient is not zero.
        finite: bool scalar, whether the Gramian of the present clusters is.
    """

    cosines: Tensor
    norms: Tensor
    active: Tensor
    finite: Tensor


def unit_gramian(gramian: Tensor, present: Tensor) -> UnitGramian:
    """Divide a Gramian by its gradients' norms; what stands in the rows of absent clusters is not looked at."""
    gram = torch.where(present.unsqueeze(0) & present.unsqueeze(1), gramian.double(), 0)
    active = gram.diagonal() > 0
    norms = torch.where(active, gram.diagonal(), 1).sqrt()
    # One norm after the other: their product could overflow.
    cosines = gram * norms.reciprocal().unsqueeze(1) * norms.reciprocal()
    identity = torch.eye(len(norms), dtype=gram.dtype, device=gram.device)
    cosines = torch.where(active.unsqueeze(0) & active.unsqueeze(1) & (identity == 0), cosines, identity)
    return UnitGramian(cosines, norms, active, gram.isfinite().all())


def relative_norms(unit: UnitGramian) -> Tensor:
    """Return the norms over the largest, [K]; 1 for clusters that are not active."""
    largest = torch.where(unit.active, unit.norms, 0).amax()
    return torch.where(unit.active, unit.norms / largest, 1)


def finite_unit_gramian(gramian: Tensor, present: Tensor) -> UnitGramian:
    """`unit_gramian` of G, or of 0 where G is not finite: a factorisation may refuse NaN."""
    finite = (gramian.isfinite() | ~(present.unsqueeze(0) & present.unsqueeze(1))).all()
    return unit_gramian(torch.where(finite, gramian, 0), present)._replace(finite=finite)


def as_weights(found: Tensor, unit: UnitGramian, dtype: torch.dtype) -> Tensor:
    """Return the weights of the active clusters, 0 for the others; all NaN where the Gramian is not finite."""
    return torch.where(unit.finite, torch.where(unit.active, found, 0), torch.nan).to(dtype)
