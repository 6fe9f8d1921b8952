"""A batch of a single cluster: its gradient is that of a plain backward, of whatever model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..distributed import PlainArrivals, refuse_sparse
from .parameters import grads_set_aside
from .stores import Rows, Store


def collect_plain(
    parameters: Sequence[nn.Parameter],
    objective: Tensor,
    store: Store | Rows,
    k: int,
    arrivals: PlainArrivals,
) -> None:
    """Run a plain backward; the parameters' gradients go to a store, as those of cluster k, when they come.

    Args:
        parameters: the trainable parameters.
        objective: a scalar, of the samples of cluster k alone.
        store: what takes the gradients.
        k: the cluster.
        arrivals: hears of them.

    Raises:
        ValueError: a gradient is sparse.
    """

    def take(position: int, grad: Tensor) -> None:
        refuse_sparse(grad)
        parameters[position].grad = None
        store.add_row(position, k, grad)

    with grads_set_aside(parameters), arrivals.calling(parameters, take):
        objective.backward()
