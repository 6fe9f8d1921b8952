"""What the weightings computed from a Gramian in plain PyTorch share: scale, absent clusters, overflow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._checks import check_present, check_same_device, check_square
from ..ops._gramians import UnitGramian, unit_gramian
from ._interface import GramianWeighting


class UnitGramianWeighting(GramianWeighting):
    """A weighting that is given cosines and norms in float64, at any scale that the Gramian's dtype can hold.

    Absent clusters, and those whose gradient is zero and has nothing to weigh, get weight 0 and take no part. The
    weights are NaN where the Gramian of the present clusters is not finite. Nothing is read on the host.
    """

    @torch.no_grad()
    def forward(self, gramian: Tensor | None, present: Tensor | None = None) -> Tensor:
        """Return the weights; see `GramianWeighting.forward`.

        Raises:
            TypeError: no Gramian is given, or a dtype is not as stated.
            ValueError: a shape or device does not fit.
        """
        if gramian is None:
            raise TypeError("gramian: expected a tensor [K, K], found None")
        check_square("gramian", gramian)
        k = gramian.shape[0]
        present = torch.ones(k, dtype=torch.bool, device=gramian.device) if present is None else present
        check_present(present, k)
        check_same_device(gramian=gramian, present=present)
        finite = (gramian.isfinite() | ~(present.unsqueeze(0) & present.unsqueeze(1))).all()
        # Of a Gramian that overflowed nothing is computed: a factorisation may refuse NaN.
        unit = unit_gramian(torch.where(finite, gramian, 0), present)
        weights = self.weigh(unit, present.sum(), 4 * k * torch.finfo(gramian.dtype).eps)
        weights = torch.where(finite, torch.where(unit.active, weights, 0), torch.nan)
        return weights.to(gramian.dtype)

    def weigh(self, unit: UnitGramian, number: Tensor, ridge: float) -> Tensor:
        """Compute the weights of the active clusters.

        Args:
            unit: the cosines and norms; of clusters that are not active the row of the identity and norm 1.
            number: n, the present clusters, a scalar on the device.
            ridge: above what the Gramian's rounding moves the eigenvalues of the cosines by; added to them, it
                makes them positive.

        Returns:
            w, float64 [K]; what stands at clusters that are not active is not looked at.
        """
        raise NotImplementedError(f"{type(self).__name__} must define weigh(unit, number, ridge)")


def relative_norms(unit: UnitGramian) -> Tensor:
    """Return the norms over the largest, [K]; 1 for clusters that are not active."""
    largest = torch.where(unit.active, unit.norms, 0).amax()
    return torch.where(unit.active, unit.norms / largest, 1)
