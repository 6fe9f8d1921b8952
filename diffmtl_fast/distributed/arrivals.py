"""Tells during a backward which parameters' gradients are complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


class Arrivals:
    """Counts the gradients that come for each parameter, and tells when the last one has come.

    Args:
        expected: how many come for a parameter, by position. Of others nothing is told.
        complete: called once with the position of a parameter when as many have come; at once where none will.
    """

    def __init__(self, expected: Mapping[int, int], complete: Callable[[int], None]) -> None:
        self._left, self._complete = dict(expected), complete
        for position, number in self._left.items():
            if not number:
                complete(position)

    def note(self, position: int) -> None:
        """Count one.

        Raises:
            RuntimeError: more come than were expected; those before may be under way to other processes.
        """
        if position not in self._left:
            return
        self._left[position] -= 1
        if self._left[position] < 0:
            raise RuntimeError(
                f"parameter {position}: expected the last use of a parameter to be known from the forward, found "
                "one more in the backward; checkpoint with use_reentrant=False"
            )
        if self._left[position] == 0:
            self._complete(position)


class PlainArrivals:
    """Hears of the gradients of plain backwards.

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

    @contextmanager
    def calling(
        self, parameters: Sequence[nn.Parameter], take: Callable[[int, Tensor], None]
    ) -> Iterator[None]:
        """Call `take` with a parameter's position and ``.grad`` whenever the backward inside has added to it."""
        pieces: Counter[int] = Counter()

        def hook_of(position: int) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                if parameter.grad is not None:
                    pieces[position] += 1
                    take(position, parameter.grad)

            return hook

        hooks = [p.register_post_accumulate_grad_hook(hook_of(i)) for i, p in enumerate(parameters)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        known = [id(p) for p in parameters]
        if known != self._parameters:
            self._parameters, self._pieces = known, Counter()
        self._pieces |= pieces


def refuse_sparse(grad: Tensor) -> None:
    """Refuse a sparse gradient.

    Raises:
        ValueError: it is one.
    """
    if grad.is_sparse:
        raise ValueError(
            "model: expected dense gradients, found a sparse one, which is not added up between processes; make "
            "its embedding with sparse=False"
        )
