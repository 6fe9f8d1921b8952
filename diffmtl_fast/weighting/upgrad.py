"""UPGrad: every gradient projected onto the directions that harm no cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._gramians import UnitGramian, relative_norms
from ._from_gramian import UnitGramianWeighting
from ._nonnegative import NonnegativeQuadratic
from ._registry import register


@register(
    "upgrad",
    title="UPGrad",
    update="every gradient projected onto the directions that harm no cluster",
    year=2024,
)
class UPGrad(UnitGramianWeighting):
    """Mean of the gradients, each projected onto the cone of the d with ⟨d, g_k⟩ ≥ 0 for all k.

    No cluster loss rises along −d, and where nothing conflicts w = 1. The projection of g_k is Jᵀv with the v that
    minimises vᵀGv over v ≥ e_k, which is solved exactly; w is the sum of the v. A common factor of the gradients
    does not change it.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, proposition 1.
    """

    @staticmethod
    def weigh(unit: UnitGramian, number: Tensor, ridge: float) -> Tensor:
        """Return Σ v; see `UnitGramianWeighting.weigh`. The unknowns are x_j = (v_j − [j = k]) |g_j| / |g_k|."""
        norms = relative_norms(unit)
        matrix = unit.cosines + ridge * torch.eye(len(norms), dtype=norms.dtype, device=norms.device)
        return 1 + norms @ NonnegativeQuadratic(matrix).minimise(matrix) / norms
