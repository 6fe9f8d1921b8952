"""A batch of a single cluster: its gradient is that of a plain backward, of whatever model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from .parameters import grads_set_aside
from .stores import Rows, Store


class PlainPass:
    """Runs plain backwards, whose gradients go to a store as soon as they have come.

    Autograd hands a parameter its gradient in one piece, but for reentrant checkpoints, which run backwards of
    their own. Which parameters they split is seen in the first backward.
    """

    def __init__(self) -> None:
        self._parameters: list[int] = []  # of the last backward
        self._pieces: Counter[int] = Counter()

    def expected(self, parameters: Sequence[nn.Parameter]) -> Mapping[int, int]:
        """Return of the parameters, by position, which get their gradient in one piece; none before it is seen."""
        if [id(p) for p in parameters] != self._parameters:
            return {}
        return {position: 1 for position, pieces in self._pieces.items() if pieces == 1}

    def collect(
        self, parameters: Sequence[nn.Parameter], objective: Tensor, store: Store | Rows, k: int
    ) -> None:
        """Run a plain backward; the parameters' gradients go to a store, as those of cluster k.

        Args:
            parameters: the trainable parameters.
            objective: a scalar, of the samples of cluster k alone.
            store: what takes the gradients.
            k: the cluster.

        Raises:
            ValueError: a gradient is sparse.
        """
        pieces: Counter[int] = Counter()

        def taking(position: int) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                grad, parameter.grad = parameter.grad, None
                if grad is not None:
                    _refuse_sparse(grad)
                    pieces[position] += 1
                    store.add_row(position, k, grad)

            return hook

        with grads_set_aside(parameters):
            hooks = [p.register_post_accumulate_grad_hook(taking(i)) for i, p in enumerate(parameters)]
            try:
                objective.backward()
            finally:
                for hook in hooks:
                    hook.remove()
        known = [id(p) for p in parameters]
        if known != self._parameters:
            self._parameters, self._pieces = known, Counter()
        self._pieces |= pieces


def _refuse_sparse(grad: Tensor) -> None:
    if grad.is_sparse:
        raise ValueError(
            "model: expected dense gradients, found a sparse one, which is not added up between processes; make "
            "its embedding with sparse=False"
        )
