"""What ranks settle before their first step: that they are about to do the same, from the same numbers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .ranks import Ranks


def settle(
    ranks: Ranks,
    model: nn.Module,
    weighting: nn.Module,
    settings: Mapping[str, Any],
    *,
    fully_sharded: bool = False,
) -> None:
    """Refuse ranks that differ, and give all of them rank 0's parameters and buffers.

    Args:
        ranks: the ranks.
        model: the model.
        weighting: the weighting.
        settings: what else has to be the same, by its name in messages.
        fully_sharded: whether `fully_shard` has sharded the model, whose parameters then stay as they are.

    Raises:
        ValueError: ranks differ, or the parameters are no replicas.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    described = [f"{name} {list(p.shape)} {p.dtype}" for name, p in model.named_parameters()]
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
    own = {
        **{name: str(value) for name, value in settings.items()},
        "weighting": type(weighting).__name__,
        "number of parameters": str(sum(p.numel() for p in model.parameters())),
        "trainable parameters": str(len(trainable)),
        "names, shapes and dtypes of the parameters": digest,
        "sharded parameters": str(_sharded(model)),
    }
    _refuse_differences(ranks.gather_objects(own))
    if not fully_sharded and (sharded := _sharded(model)):
        raise ValueError(
            f"model: expected a whole replica on every rank, found sharded parameters: {sharded}; call "
            "fully_shard on the model before ClusteredMTL(model, ...); FullyShardedDataParallel and tensor "
            "parallel are not supported"
        )
    replicated = [*weighting.parameters(), *weighting.buffers(), *model.buffers()]
    if not fully_sharded:
        replicated.extend(model.parameters())
    state = [tensor.detach() for tensor in replicated]
    with torch.no_grad():
        ranks.broadcast_(state)


def _refuse_differences(told: list[dict[str, str]]) -> None:
    for name in dict.fromkeys(name for each in told for name in each):
        found: dict[str, list[int]] = {}
        for rank, each in enumerate(told):
            found.setdefault(each.get(name, "nothing"), []).append(rank)
        if len(found) > 1:
            values = "; ".join(f"{value} on rank {', '.join(map(str, at))}" for value, at in found.items())
            raise ValueError(f"expected the same {name} on every rank, found {values}")


def _sharded(model: nn.Module) -> str | None:
    """Return the name of a sharded parameter or module, if there is one."""
    tensor = sys.modules.get("torch.distributed.tensor")  # slow to import, and nothing is sharded without it
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if tensor is not None:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, tensor.DTensor):
                return name
    if fsdp is not None:
        for name, module in model.named_modules():
            if isinstance(module, fsdp.FullyShardedDataParallel | fsdp.FSDPModule):
                return name or type(module).__name__
    return None
