"""DB-MTL's balance of the gradients: all made as long as the longest."""

from __future__ import annotations

from torch import Tensor

from ..ops._gramians import UnitGramian, relative_norms
from ._from_gramian import UnitGramianWeighting
from ._registry import register


@register(
    "db_mtl",
    title="DB-MTL",
    short="DB-MTL",
    update="the mean of the gradients, all made as long as the longest",
    year=2023,
)
class DBMTL(UnitGramianWeighting):
    """Gradients of one length: w_k = max_j |g_j| / |g_k|.

    A common factor of the gradients does not change the weights, and a factor of one cluster's gradient shorter
    than the longest does not change the direction. The gradient of log L_k has the direction of that of L_k, so
    that only the common length tells whether losses or their logarithms are balanced; the log form for losses
    alone is `ScaleInvariant`.

    Source: Lin et al., "Dual-Balancing for Multi-Task Learning", 2023, arXiv 2308.12029. Deviations: the gradients
    are those of the step, without the moving average (β = 0 there), whose K gradients no Gramian holds; the length
    is that of the gradients of the losses.
    """

    @staticmethod
    def weigh(unit: UnitGramian, number: Tensor, ridge: float) -> Tensor:
        """Return w; see `UnitGramianWeighting.weigh`."""
        return 1 / relative_norms(unit)
