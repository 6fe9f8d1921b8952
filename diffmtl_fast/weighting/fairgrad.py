"""FairGrad: α-fair improvements of the clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from .._host import on_host
from ..ops._gramians import UnitGramian, relative_norms
from ._from_gramian import UnitGramianWeighting
from ._registry import register

# Newton steps and the halvings of a step that are tried together.
NEWTON_STEPS = 60
HALVINGS = 12
# Relative change in the last step, which squares it.
CONVERGED = 1e-8
# Of the way to a bound that a step may go.
INSIDE = 0.95


@register("fairgrad", title="FairGrad", update="improvements of the clusters that are α-fair", year=2024)
class FairGrad(UnitGramianWeighting):
    """α-fair weights: the w > 0 with G̃w = w^(−1/α), G̃ = G / ‖G‖_F over the present clusters.

    The direction maximises the α-fair utility of the improvements ⟨g_k, d⟩ within a ball, and all are positive:
    α → 0 is the mean loss, 1 is NashMTL, and the larger α, the more the worst-off cluster counts. Dividing by
    the Frobenius norm, as `NashMTL` does, makes the weights independent of a common factor of the gradients.

    w is the unique minimum of the strictly convex ½ wᵀG̃w − Σ w_k^(1−1/α) / (1−1/α), with Σ log w_k for α = 1,
    found by Newton's method in the unknowns w_k |g_k|. No w exists where no direction improves all clusters; so
    G_kk counts 1 + √eps times (eps of the Gramian's dtype), which bounds w.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024.

    Args:
        alpha: α, the degree of fairness, from 0.5 to 5: beyond, Newton's method needs more steps than it is given.

    Raises:
        ValueError: `alpha` is not between 0.5 and 5.
    """

    def __init__(self, alpha: float = 2.0) -> None:
        super().__init__()
        if not 0.5 <= alpha <= 5:
            raise ValueError(f"alpha: expected 0.5 to 5, found {alpha}")
        self.alpha = alpha
        self.settings = (alpha,)

    @staticmethod
    def weigh(unit: UnitGramian, number: Tensor, ridge: float, alpha: float) -> Tensor:
        """Return w; see `UnitGramianWeighting.weigh`."""
        power, k = 1 / alpha, len(unit.norms)
        norms = relative_norms(unit)
        identity = torch.eye(k, dtype=norms.dtype, device=norms.device)
        lengths = torch.where(unit.active, norms, 0)
        frobenius = torch.linalg.matrix_norm(unit.cosines * lengths.unsqueeze(1) * lengths)
        matrix = unit.cosines + (ridge / (4 * k)) ** 0.5 * identity
        # In β = w |g|: Cβ = c β^(−1/α) with c = |g|^(1/α − 1), all relative to the largest norm.
        beta = _newton(matrix, norms ** (power - 1), power)
        return beta / norms * frobenius ** (1 / (1 + power))

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"alpha={self.alpha}"


def _newton(matrix: Tensor, pull: Tensor, power: float) -> Tensor:
    """Solve Cβ = c β^−p for β > 0, C positive definite; `pull` is c."""
    beta = pull ** (1 / (1 + power))  # the solution of C = 1; then the best multiple of it
    beta = beta * ((pull * beta ** (1 - power)).sum() / (beta @ matrix @ beta)) ** (1 / (1 + power))
    halves = 0.5 ** torch.arange(HALVINGS, dtype=beta.dtype, device=beta.device).unsqueeze(1)
    for _ in range(NEWTON_STEPS):
        resistance = pull * beta**-power
        hessian = matrix + torch.diag(power * resistance / beta)
        factor, _ = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve((resistance - matrix @ beta).unsqueeze(1), factor).squeeze(1)
        bound = torch.where(step < 0, -INSIDE * beta / step, 1).amin().clamp(max=1)
        tried = beta + bound * halves * step
        # The length at which the objective is flattest along the step: the values themselves are lost in rounding.
        slopes = (tried @ matrix - pull * tried**-power) @ step
        moved = tried.index_select(0, slopes.abs().argmin(0, keepdim=True)).squeeze(0)
        # Reading this stalls an accelerator, so only the CPU leaves early; further steps change nothing.
        converged = on_host(beta) and bool((step.abs() <= CONVERGED * beta).all())
        beta = moved
        if converged:
            break
    return beta
