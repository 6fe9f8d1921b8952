"""CAGrad: near the mean gradient, the direction that helps the worst-off cluster most."""

from __future__ import annotations

import torch
from torch import Tensor

from .._host import on_host
from ..ops._gramians import UnitGramian, relative_norms
from ._from_gramian import UnitGramianWeighting
from ._nonnegative import NonnegativeQuadratic
from ._registry import register

# Newton steps towards the worst improvement; after 10, random Gramians are right to 1e-8, after 12 to rounding.
NEWTON_STEPS = 12
CONVERGED = 1e-14
# Added to the cosine of a gradient with itself: it bounds the weights where nothing improves all clusters.
RIDGE = 1e-10


@register(
    "cagrad",
    title="CAGrad",
    update="near the mean gradient, what improves the worst-off cluster most",
    year=2021,
)
class CAGrad(UnitGramianWeighting):
    """Conflict-averse direction: the d with |d − g₀| ≤ c |g₀| that maximises min_k ⟨g_k, d⟩, g₀ the mean gradient.

    d = g₀ + Σ v_k g_k with v ≥ 0, so the weights are w = 1 + n v, which a common factor of the gradients does not
    change. They are exact: for a worst improvement m the v that keeps ⟨g_k, d⟩ ≥ m at the least distance from g₀
    minimises the quadratic ½ vᵀGv + Σ (⟨g_k, g₀⟩ − m) v_k, and Newton's method finds the m at which that distance,
    convex in m, is c |g₀|. For c < 1 the update converges to a minimum of the mean loss; d need not improve every
    cluster. Where no direction improves all clusters many v are right, large ones among them: G_kk counts 1 +
    10⁻¹⁰ times (4 K eps of the Gramian's dtype, if that is more), which bounds v, and m is 0 but for its root.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, algorithm 1,
    whose dual problem over the simplex has the same solution.

    Args:
        c: the radius of the ball around the mean gradient, relative to its length. 0 is ordinary training.

    Raises:
        ValueError: `c` is negative.
    """

    def __init__(self, c: float = 0.5) -> None:
        super().__init__()
        if not c >= 0:
            raise ValueError(f"c: expected at least 0, found {c}")
        self.c = c
        self.settings = (c,)

    @staticmethod
    def weigh(unit: UnitGramian, number: Tensor, ridge: float, c: float) -> Tensor:
        """Return 1 + n v; see `UnitGramianWeighting.weigh`. The unknowns are u_k = v_k |g_k|."""
        norms = relative_norms(unit)
        lengths, inverse = (torch.where(unit.active, values, 0) for values in (norms, 1 / norms))
        matrix = unit.cosines + max(ridge, RIDGE) * torch.eye(
            len(norms), dtype=norms.dtype, device=norms.device
        )
        along = matrix @ lengths / number  # ⟨g_k, g₀⟩ / |g_k|
        radius = c * (lengths @ along / number).sqrt()
        # No m above this is in reach of the cluster that it is the least for.
        worst = torch.where(unit.active, norms * (along + radius), torch.inf).amin()
        quadratic = NonnegativeQuadratic(matrix)
        u = torch.zeros_like(norms)
        for _ in range(NEWTON_STEPS):
            u = quadratic.minimise((along - worst * inverse).unsqueeze(0), u.unsqueeze(0)).squeeze(0)
            distance = (u @ matrix @ u).sqrt()
            step = (distance - radius) * distance / (u @ inverse)
            worst = worst - torch.where(distance > radius, step, 0)
            # Reading this stalls an accelerator, so only the CPU leaves early; further steps change nothing.
            if on_host(norms) and not distance > radius * (1 + CONVERGED):
                break
        return 1 + number * u / norms

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"c={self.c}"
