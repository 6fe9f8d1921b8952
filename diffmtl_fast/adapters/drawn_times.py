"""Losses that draw the times themselves: SiT's transport, EDM2's loss, denoising-diffusion-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..clustering import IntervalClustering, NoiseClustering
from ..gradients import ClusteredMTL


class LooksUpClusters(nn.Module):
    """Stands where the model was called with times that a loss has drawn, and looks their clusters up.

    Everything else is asked of the model: attributes that it has, and its state.

    Args:
        mtl: the wrapper.
        clusters: of the times, or of σ.

    Example:
        ``loss_dict = transport.training_losses(LooksUpClusters(mtl, clusters), x, model_kwargs)``
    """

    def __init__(self, mtl: ClusteredMTL, clusters: IntervalClustering | NoiseClustering) -> None:
        super().__init__()
        self.mtl, self.clusters = mtl, clusters

    def forward(self, x: Tensor, time: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the model with times, one of every sample in any shape with B elements."""
        return self.mtl(x, time, *args, cluster=self.clusters.assign(time.flatten()), **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model where this module has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            mtl: Any = super().__getattr__("mtl")
            return getattr(mtl.module, name)


def stratified_sample(clusters: NoiseClustering) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return what takes the place of ``transport.sample``: equally many times of every cluster.

    Args:
        clusters: of the times, which reach from 0 to 1.

    Returns:
        A function of data x1 [B, ...], which returns times [B], noise like x1, and x1.

    Example:
        ``transport.sample = stratified_sample(clusters)``
    """

    def sample(x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time, _ = clusters.sample(len(x1), device=x1.device)
        return time.to(x1), torch.randn_like(x1), x1

    return sample
