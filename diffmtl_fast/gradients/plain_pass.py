"""A batch of a single cluster: its gradient is that of a plain backward, of whatever model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .parameters import grads_set_aside
from .stores import Rows, Store


def collect_plain(parameters: Sequence[nn.Parameter], objective: Tensor, store: Store | Rows, k: int) -> None:
    """Run a plain backward; the parameters' gradients go to a store, as those of cluster k.

    Args:
        parameters: the trainable parameters.
        objective: a scalar, of the samples of cluster k alone.
        store: what takes the gradients.
        k: the cluster.

    Raises:
        ValueError: a gradient is sparse.
    """
    with grads_set_aside(parameters):
        objective.backward()
        found = [p.grad for p in parameters]
    if any(grad is not None and grad.is_sparse for grad in found):
        raise ValueError(
            "model: expected dense gradients, found a sparse one, which is not added up between processes; make "
            "its embedding with sparse=False"
        )
    for position, grad in enumerate(found):
        if grad is not None:
            store.add_row(position, k, grad)
