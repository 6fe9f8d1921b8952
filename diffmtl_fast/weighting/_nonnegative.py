"""The minimum of a convex quadratic over non-negative unknowns, exact and without reading the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .._host import on_host

# Up to here all supports are tried at once: one batch of 2^K small inverses, and no iterations.
ENUMERATED = 6
# Steps of the active-set method per unknown: each enters and leaves the support, and some do so again.
STEPS_PER_UNKNOWN = 4
# The relative slope that counts as zero.
ZERO = 1e-13


class NonnegativeQuadratic:
    """Minimises ½ xᵀQx + qᵀx over x ≥ 0, for one Q and any number of q.

    The minimum x is what satisfies x ≥ 0, Qx + q ≥ 0 and xᵀ(Qx + q) = 0. Up to six unknowns every support is
    tried; beyond, the active-set method of Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23,
    runs for all q at once.

    Args:
        matrix: Q, float64 [K, K], symmetric positive definite. A ridge makes a semidefinite one so.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.k = len(matrix)
        self.identity = torch.eye(self.k, dtype=torch.bool, device=matrix.device)
        if self.k <= ENUMERATED:
            bits = torch.arange(self.k, device=matrix.device)
            self.supports = (torch.arange(2**self.k, device=matrix.device).unsqueeze(1) >> bits) & 1 == 1
            inverse, _ = torch.linalg.inv_ex(self._restricted(self.supports))
            self.inverses = torch.where(self._pairs(self.supports), inverse, 0)

    def minimise(self, linear: Tensor, start: Tensor | None = None) -> Tensor:
        """Return the minima x, [B, K], of the given q, [B, K]; a `start` near them saves time."""
        return self._enumerate(linear) if self.k <= ENUMERATED else self._exchange(linear, start)

    @staticmethod
    def _pairs(support: Tensor) -> Tensor:
        return support.unsqueeze(-1) & support.unsqueeze(-2)

    def _restricted(self, support: Tensor) -> Tensor:
        """Q on the support, the identity elsewhere: [B, K, K]."""
        return torch.where(self._pairs(support), self.matrix, self.identity.to(self.matrix.dtype))

    def _enumerate(self, linear: Tensor) -> Tensor:
        """Minimise on every support, and choose where the conditions of the minimum are violated the least.

        On a singular support rounding leaves a slope that is not 0, so that another one is chosen.
        """
        tried = -(self.inverses @ linear.T)  # [2^K, K, B]
        tried = tried - self.inverses @ (self.matrix @ tried + linear.T)  # what rounding left
        slopes = self.matrix @ tried + linear.T
        on_support = torch.minimum(tried, -slopes.abs())
        best = torch.where(self.supports.unsqueeze(2), on_support, slopes).amin(1).argmax(0)
        found = tried.permute(0, 2, 1)[best, torch.arange(len(linear), device=linear.device)]
        return found.clamp(min=0)

    def _exchange(self, linear: Tensor, start: Tensor | None = None) -> Tensor:
        """Let one unknown at a time become positive; drop those that the minimum on the support has below 0."""
        x = torch.zeros_like(linear) if start is None else start
        support = x > 0
        at_minimum = ~support.any(1, keepdim=True)  # of its support
        threshold = -ZERO * linear.abs().amax(1, keepdim=True)
        for _ in range(STEPS_PER_UNKNOWN * self.k):
            slope, steepest = torch.where(support, 0, x @ self.matrix + linear).min(1, keepdim=True)
            entering = at_minimum & (slope < threshold)
            # Reading this stalls an accelerator, so only the CPU leaves early; further steps change nothing.
            if on_host(linear) and not (entering | ~at_minimum).any():
                break
            support = support | (entering & self.identity[steepest.squeeze(1)])
            factor, _ = torch.linalg.cholesky_ex(self._restricted(support))
            target = torch.cholesky_solve(torch.where(support, -linear, 0).unsqueeze(2), factor).squeeze(2)
            below = support & (target < 0)
            length, first = torch.where(below, x / (x - target), torch.inf).min(1, keepdim=True)
            at_minimum = length.isinf()
            dropped = ~at_minimum & self.identity[first.squeeze(1)]
            support = support & ~dropped
            x = torch.where(at_minimum, target, torch.lerp(x, target, length.clamp(max=1)).clamp(min=0))
            x = torch.where(support, x, 0)
        return x
