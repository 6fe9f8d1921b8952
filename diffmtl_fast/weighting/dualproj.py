"""DualProj: the mean gradient projected onto the directions that harm no cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._gramians import UnitGramian, relative_norms
from ._from_gramian import UnitGramianWeighting
from ._nonnegative import NonnegativeQuadratic
from ._registry import register


@register(
    "dualproj",
    title="DualProj",
    update="the mean gradient projected onto the directions that harm no cluster",
    year=2017,
)
class DualProj(UnitGramianWeighting):
    """The d nearest to the mean gradient with ⟨d, g_k⟩ ≥ 0 for all k.

    No cluster loss rises along −d, and where the mean gradient already harms none w = 1. The projection is
    d = (1/n) Jᵀw with the w that minimises wᵀGw over w ≥ 1, which is solved exactly. A common factor of the
    gradients does not change it.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017,
    there for the gradient of one task and constraints from others; the name is TorchJD's.
    """

    @staticmethod
    def weigh(unit: UnitGramian, number: Tensor, ridge: float) -> Tensor:
        """Return w; see `UnitGramianWeighting.weigh`. The unknowns are x_k = (w_k − 1) |g_k|."""
        norms = relative_norms(unit)
        matrix = unit.cosines + ridge * torch.eye(len(norms), dtype=norms.dtype, device=norms.device)
        excess = NonnegativeQuadratic(matrix).minimise((matrix @ norms).unsqueeze(0)).squeeze(0)
        return 1 + excess / norms
