"""IMTL-G: a direction whose projections onto all gradients are equal."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._eigh import eigh
from ..ops._gramians import UnitGramian, relative_norms
from ._from_gramian import UnitGramianWeighting
from ._registry import register


@register(
    "imtl_g",
    title="IMTL-G",
    short="IMTL-G",
    update="equal projections onto all gradients",
    year=2021,
)
class IMTLG(UnitGramianWeighting):
    """Impartial direction: d = Σ α_k g_k with Σ α_k = 1 and the same ⟨d, g_k⟩ / |g_k| for every k.

    With the cosines C, the β = α_k |g_k| solve C β ∝ 1. Where C is singular they are C⁺1, with the pseudo-inverse;
    equal projections then need not exist, and β is nearest to them. The weights are w = n α, which a common factor
    of the gradients does not change. They may be negative, and nothing keeps the common projection above 0. Where
    the α_k found sum to zero they cannot be normalised, and w = 0.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021.
    """

    @staticmethod
    def weigh(unit: UnitGramian, number: Tensor, ridge: float) -> Tensor:
        """Return n α; see `UnitGramianWeighting.weigh`."""
        values, vectors = eigh(unit.cosines)
        ones = unit.active.to(values.dtype)
        inverse = torch.where(values > ridge * values[-1], 1 / values, 0)
        combination = vectors @ (inverse * (ones @ vectors)) * ones / relative_norms(unit)
        total = combination.sum()
        cancels = total.abs() <= ridge * combination.abs().sum()
        return torch.where(cancels, 0, number * combination / total)
