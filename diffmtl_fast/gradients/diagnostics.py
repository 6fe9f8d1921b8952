"""What the Gramian of the cluster gradients says about their conflicts."""

from __future__ import annotations

import torch
from torch import Tensor


def cosines(gramian: Tensor) -> Tensor:
    """Cosines of the angles between cluster gradients, from their Gramian.

    Args:
        gramian: [K, K] inner products, floating point.

    Returns:
        [K, K]; NaN in the rows and columns of clusters without a gradient.
    """
    norms = gramian.diagonal().sqrt()
    return (gramian / (norms[:, None] * norms)).clamp(-1.0, 1.0)


def conflicts(cosines: Tensor) -> Tensor:
    """Share of the pairs of clusters whose gradients conflict: have a negative cosine.

    Args:
        cosines: [..., K, K], NaN where there is none.

    Returns:
        [...], 0 to 1; NaN where there is no pair.
    """
    upper = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    pairs = upper & ~cosines.isnan()
    return (pairs & (cosines < 0)).sum((-2, -1)) / pairs.sum((-2, -1))
