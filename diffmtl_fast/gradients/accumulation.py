"""Batches that are weighed as one: what they leave until the last of them comes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from .stores import Jacobian, Rows, Store


@dataclass
class Accumulation:
    """What the backwards within `ClusteredMTL.no_sync` leave to the next one outside.

    Attributes:
        unit: rows of the store are gradients of the sum of a cluster's losses, divided by this.
        scaled: whether they are those of a GradScaler.
        totals: float64 [2, K], number of samples and sum of losses of every cluster.
        store: their gradients.
        failed: the error of a backward, which leaves the rest without meaning.
    """

    unit: int
    scaled: bool
    totals: Tensor
    store: Store | Rows | None = None
    failed: str = field(default="")

    def factors(self, totals: Tensor) -> Tensor:
        """Return what makes a row the gradient of L_k / n, [K], from the totals of all backwards and ranks."""
        number = (totals[0] > 0).sum()
        return self.unit / (totals[0].clamp(min=1) * number)

    def take(self, store: Store) -> Store:
        """Let an empty store go on from the rows that plain backwards have left."""
        if isinstance(self.store, Rows):
            for position, k, row in self.store.items():
                store.add_row(position, k, row)
            return store
        return store if self.store is None else self.store

    def refuse_another(self, store: Jacobian) -> None:
        """Refuse another Jacobian than that of the backwards before.

        Raises:
            RuntimeError: there is another, because the trainable parameters have changed.
        """
        if isinstance(self.store, Jacobian) and self.store is not store:
            raise RuntimeError(
                "expected the same trainable parameters in all backwards of a step, found others"
            )


def tally(loss: Tensor, cluster: Tensor, num_clusters: int) -> Tensor:
    """Return the number of samples and the sum of losses of every cluster, float64 [2, K]."""
    counts = torch.zeros(num_clusters, dtype=torch.float64, device=loss.device)
    counts.index_add_(0, cluster, torch.ones_like(cluster, dtype=torch.float64))
    return torch.stack([counts, ops.cluster_mean(loss.detach(), cluster, num_clusters).double() * counts])
