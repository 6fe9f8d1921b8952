"""Task affinity the published way: the gradient of one timestep after the other, then a loop over all pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_gradients(
    model: nn.Module, losses: Callable[[int], Iterable[Tensor]], timesteps: Sequence[int]
) -> list[Tensor]:
    """Differentiate the loss of every timestep with backward passes of its own.

    Args:
        model: the model; its ``.grad`` are used and cleared.
        losses: timestep to the mean losses of its batches, each with a graph of its own.
        timesteps: the tasks.

    Returns:
        One gradient [P] per timestep, on the CPU.
    """
    gradients = []
    for t in timesteps:
        model.zero_grad()
        for loss in losses(t):
            loss.backward()
        found = [p.grad.detach().cpu().flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found).clone())
    model.zero_grad()
    return gradients


def pairwise_cosines(gradients: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> Tensor:
    """Compute the cosine of every pair by itself.

    Args:
        gradients: n gradients [P].
        others: m gradients; by default the same ones.

    Returns:
        float64 [n, m].
    """
    others = gradients if others is None else others
    scores = torch.zeros(len(gradients), len(others), dtype=torch.float64)
    for i, left in enumerate(gradients):
        for j, right in enumerate(others):
            scores[i, j] = F.cosine_similarity(left.unsqueeze(0), right.unsqueeze(0)).item()
    return scores
