"""MGDA: the shortest convex combination of the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._gramians import UnitGramian, relative_norms
from ._from_gramian import UnitGramianWeighting
from ._nonnegative import NonnegativeQuadratic
from ._registry import register


@register("mgda", title="MGDA", update="the shortest convex combination of the gradients", year=2012)
class MGDA(UnitGramianWeighting):
    """Minimum-norm point of the gradients' convex hull: d = Σ α_k g_k with the α ≥ 0, Σ α_k = 1, of least |d|².

    No cluster loss rises along −d: ⟨d, g_k⟩ ≥ |d|² for every k, and d = 0 exactly where no direction improves all
    clusters. The weights are w = n α, which a common factor of the gradients does not change. The minimum is
    exact: with y ≥ 0 and τ = min |g_k|² it is α = y / Σ y_k of the unconstrained scale,

        min ½ yᵀ(G + τ 11ᵀ) y − τ Σ y_k,

    which has the same optimality conditions, and is solved in the unknowns y_k |g_k|.

    Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", C. R. Acad.
    Sci. Paris 350, 2012; Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018,
    whose Frank-Wolfe iterations approach the same point. SDMGrad, its variant for noisy gradients, needs the
    products of two independent batches, which no Gramian holds, and is not among the weightings.
    """

    @staticmethod
    def weigh(unit: UnitGramian, number: Tensor, ridge: float) -> Tensor:
        """Return n α; see `UnitGramianWeighting.weigh`."""
        norms = relative_norms(unit)
        # √τ / |g_k|, at most 1.
        nearness = torch.where(unit.active, norms.amin() / norms, 0)
        identity = torch.eye(len(norms), dtype=norms.dtype, device=norms.device)
        quadratic = NonnegativeQuadratic(unit.cosines + nearness.outer(nearness) + ridge * identity)
        combination = quadratic.minimise(-nearness.unsqueeze(0)).squeeze(0) * nearness
        return number * combination / combination.sum()
