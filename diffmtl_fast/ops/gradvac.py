"""`gradvac_weights`: GradVac as a map from the Gramian and the target cosines to weights and moved targets."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_order, check_present, check_same_device, check_square, check_targets
from ._gramians import as_weights, finite_unit_gramian, relative_norms
from ._library import call, define_op, refuse_autograd

# The largest target: at 1 the correction has no bound.
LARGEST = 1 - 1e-6


def gradvac_weights_plain(
    gramian: Tensor, order: Tensor, present: Tensor | None, targets: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Compute `gradvac_weights` by its definition.

    Row k of `coefficients` is g_k' / |g_k| in the unit vectors g_j / |g_j|; all rows take each step together.
    """
    k = gramian.shape[0]
    present = torch.ones(k, dtype=torch.bool, device=gramian.device) if present is None else present
    unit = finite_unit_gramian(gramian, present)
    coefficients = torch.eye(k, dtype=torch.float64, device=gramian.device)
    for partner in order.split(1, dim=1):
        images = coefficients @ unit.cosines
        length = (images * coefficients).sum(1, keepdim=True).clamp(min=0).sqrt()
        cosine = (images.gather(1, partner) / length).nan_to_num(0).clamp(-1, 1)
        target = targets.gather(1, partner)
        counts = unit.active.unsqueeze(1) & unit.active[partner]
        pull = target * (1 - cosine.square()).sqrt() / (1 - target.square()).sqrt() - cosine
        pull = torch.where(counts & (cosine < target), length * pull, 0)
        coefficients = coefficients.scatter_add(1, partner, pull)
        moved = torch.lerp(target, cosine, beta).clamp(max=LARGEST)
        targets = targets.scatter(1, partner, torch.where(counts, moved, target))
    norms = relative_norms(unit)
    found = torch.where(unit.active, norms, 0) @ coefficients / norms
    return as_weights(found, unit, gramian.dtype), targets.clone()


_gradvac_weights = define_op(
    "gradvac_weights(Tensor gramian, Tensor order, Tensor? present, Tensor targets, float beta)"
    " -> (Tensor, Tensor)",
    plain=gradvac_weights_plain,
    fake=lambda gramian, order, present, targets, beta: (
        gramian.new_empty(gramian.shape[:1]),
        torch.empty_like(targets),
    ),
)
refuse_autograd("gradvac_weights", "its weights are constants of the update; detach the Gramian")


def gradvac_weights(
    gramian: Tensor, order: Tensor, targets: Tensor, beta: float, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GradVac's weights and its targets after the step; see `diffmtl_fast.GradVac` for the formula and its source.

    Args:
        gramian: G, [K, K], floating point.
        order: int64 [K, K-1] on the same device; row k holds the other clusters in the order they are visited.
        targets: φ̂, float64 [K, K] on the same device, below 1.
        beta: β, the rate at which they follow the cosines.
        present: bool [K]; an absent cluster gets weight 0 and takes no part. Default: all present.

    Returns:
        w, [K], in the dtype of G (computed in float64), NaN where G is not finite for the present clusters; and
        the targets, float64 [K, K], those of absent clusters and of a G that is not finite as they were.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: a shape or device does not fit.
    """
    check_square("gramian", gramian)
    k = gramian.shape[0]
    check_order(order, k)
    check_targets(targets, k)
    tensors = {"gramian": gramian, "order": order, "targets": targets}
    if present is not None:
        check_present(present, k)
        tensors["present"] = present
    check_same_device(**tensors)
    return call(_gradvac_weights, "gradvac_weights", gramian, order, present, targets, beta)
