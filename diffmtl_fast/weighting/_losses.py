"""What weightings of losses share: logarithms and softmaxes in which absent clusters take no part."""

from __future__ import annotations

import torch
from torch import Tensor

from .._host import on_host


def mask_of(losses: Tensor, present: Tensor | None) -> Tensor:
    """The mask of the present clusters, bool [K]; all where none is given."""
    return torch.ones_like(losses, dtype=torch.bool) if present is None else present


def log_losses(losses: Tensor, present: Tensor) -> Tensor:
    """log L_k of the present clusters, 0 without a gradient for the others.

    Args:
        losses: [K], at least 0; 0 counts as the smallest normal number, and has no gradient.
        present: bool [K].

    Raises:
        ValueError: a loss is negative (looked for on the CPU, where looking costs no synchronisation).
    """
    kept = torch.where(present, losses, 1)
    if on_host(losses) and bool((kept < 0).any()):
        raise ValueError(f"losses: expected at least 0 (their logarithm is taken), found {float(kept.min())}")
    return kept.clamp(min=torch.finfo(losses.dtype).tiny).log()


def masked_softmax(logits: Tensor, present: Tensor) -> Tensor:
    """Softmax over the present entries, 0 for the others."""
    shares = logits.masked_fill(~present, torch.finfo(logits.dtype).min).softmax(0)
    return torch.where(present, shares, 0)
