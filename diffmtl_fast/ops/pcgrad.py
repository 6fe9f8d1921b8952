"""`pcgrad_weights`: PCGrad as a map from the Gramian to weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_order, check_present, check_same_device, check_square
from ._gramians import unit_gramian
from ._library import call, define_op, refuse_autograd


def pcgrad_weights_plain(gramian: Tensor, order: Tensor, present: Tensor) -> Tensor:
    """Compute `pcgrad_weights` by its definition.

    Row k of `coefficients` is g_k' / ‖g_k‖ written in the unit vectors g_j / ‖g_j‖: nothing in it depends on the
    gradients' norms.
    """
    cosines, norms, _, finite = unit_gramian(gramian, present)
    coefficients = torch.eye(len(norms), dtype=cosines.dtype, device=cosines.device)
    for partner in order.unbind(1):  # step by step through the order, all clusters k at once
        product = (coefficients * cosines[partner]).sum(1)  # ⟨g_k', g_j⟩ / (‖g_k‖ ‖g_j‖)
        coefficients = coefficients.scatter_add(1, partner.unsqueeze(1), -product.clamp(max=0).unsqueeze(1))
    # Multiplied before it is divided, so that a coefficient of 0 stays 0 whatever the norms are.
    weights = (coefficients * norms.unsqueeze(1) / norms).sum(0)
    return torch.where(finite, torch.where(present, weights, 0), torch.nan).to(gramian.dtype)


_pcgrad_weights = define_op(
    "pcgrad_weights(Tensor gramian, Tensor order, Tensor present) -> Tensor",
    plain=pcgrad_weights_plain,
    fake=lambda gramian, order, present: gramian.new_empty(gramian.shape[:1]),
)
refuse_autograd("pcgrad_weights", "its weights are constants of the update; detach the Gramian")


def pcgrad_weights(gramian: Tensor, order: Tensor, present: Tensor | None = None) -> Tensor:
    """PCGrad weights from the Gramian alone.

    For every cluster k, over the other clusters j in the given order: if ⟨g_k', g_j⟩ < 0, then
    g_k' −= ⟨g_k', g_j⟩ / ‖g_j‖² g_j, with the original g_j. The result Σ_k g_k' is a combination of the
    original gradients, Σ_k w_k g_k; all inner products follow from G, so no gradient is touched.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1.

    Args:
        gramian: G, [K, K], floating point.
        order: int64 [K, K-1] on the same device; row k holds the other clusters in the order they are visited.
        present: bool [K]; an absent cluster gets weight 0 and takes no part, whatever stands in its row and
            column of G. Default: all present.

    Returns:
        w, [K], in the dtype of G (computed in float64, right for gradients of any scale whose Gramian that dtype
        can hold); all 1 where nothing conflicts. NaN everywhere where G is not finite for the present clusters.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: a shape or device does not fit.
    """
    check_square("gramian", gramian)
    k = gramian.shape[0]
    check_order(order, k)
    present = torch.ones(k, dtype=torch.bool, device=gramian.device) if present is None else present
    check_present(present, k)
    check_same_device(gramian=gramian, order=order, present=present)
    return call(_pcgrad_weights, "pcgrad_weights", gramian, order, present)
