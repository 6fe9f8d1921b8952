"""The optimizer's parameter groups: the model's own, and the weighting's learned ones."""

from __future__ import annotations

from typing import Any

from torch import nn

# The rate of the log-variances in the timestep clustering paper's public code (Go et al., NeurIPS 2023).
WEIGHTING_LR = 0.025


def param_groups(
    model: nn.Module, weighting: nn.Module, *, weighting_lr: float = WEIGHTING_LR, **options: Any
) -> list[dict[str, Any]]:
    """Return parameter groups for a `torch.optim` optimizer.

    Args:
        model: the model that is trained, wrapped or not; its trainable parameters form the first group.
        weighting: its learned parameters, such as log-variances, form a second group with
            a learning rate of their own and no weight decay; a weighting without any adds no group.
        weighting_lr: that learning rate.
        **options: options of the first group, such as ``lr`` or ``weight_decay``.

    Returns:
        One or two groups, without duplicates: parameters of the weighting are never in the model's group.

    Example:
        ``torch.optim.AdamW(param_groups(model, weighting, lr=1e-4, weight_decay=0.0))``
    """
    learned = [parameter for parameter in weighting.parameters() if parameter.requires_grad]
    known = {id(parameter) for parameter in learned}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": trained, **options}]
    if learned:
        groups.append({"params": learned, "lr": weighting_lr, "weight_decay": 0.0})
    return groups
