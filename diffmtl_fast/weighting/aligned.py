"""Aligned-MTL: gradients made orthogonal and equally long, as near to the given ones as can be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._eigh import eigh
from ..ops._gramians import UnitGramian, relative_norms
from ._from_gramian import UnitGramianWeighting
from ._registry import register


@register(
    "aligned_mtl",
    title="Aligned-MTL",
    short="Aligned-MTL",
    update="the mean of gradients made orthogonal and equally long",
    year=2023,
)
class AlignedMTL(UnitGramianWeighting):
    """Mean of aligned gradients, the rows of Ĵ = √σ G^(−1/2) J, whose principal components are equally long.

    With G = V Λ Vᵀ, w = √σ V Λ^(−1/2) Vᵀ 1 over the eigenvalues that rounding leaves apart from 0; σ is the least
    of them. So Ĵ Ĵᵀ = σ 1 where G has full rank. A common factor of the gradients does not change the weights,
    which may be negative. An eigenvalue that falls below the rounding of G (4 K eps of its dtype, relative to the
    largest) drops out, and the weights jump there.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, algorithm 1
    with equal preferences.
    """

    @staticmethod
    def weigh(unit: UnitGramian, number: Tensor, ridge: float) -> Tensor:
        """Return w; see `UnitGramianWeighting.weigh`."""
        ones = unit.active.to(unit.norms.dtype)
        lengths = relative_norms(unit) * ones
        values, vectors = eigh(unit.cosines * lengths.unsqueeze(1) * lengths)
        kept = values > ridge * values[-1]
        least = torch.where(kept, values, torch.inf).amin()
        shrink = torch.where(kept, (least / values).sqrt(), 0)
        return vectors @ (shrink * (ones @ vectors))
