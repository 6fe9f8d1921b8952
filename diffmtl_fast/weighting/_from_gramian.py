"""What the weightings that need the Gramian alone share: one op runs them all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.gramian_weights import DEFINITIONS, gramian_weights
from ._interface import GramianWeighting


class UnitGramianWeighting(GramianWeighting):
    """A weighting that is given cosines and norms in float64, at any scale that the Gramian's dtype can hold.

    Absent clusters, and those whose gradient is zero and has nothing to weigh, get weight 0 and take no part. The
    weights are NaN where the Gramian of the present clusters is not finite. Nothing is read on the host. Its
    `weigh` is the definition of the op `gramian_weights`, which has kernels for some classes.

    Attributes:
        settings: the numbers that `weigh` takes behind its other arguments.
    """

    settings: tuple[float, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        DEFINITIONS[cls.__name__] = cls.weigh

    def forward(self, gramian: Tensor | None, present: Tensor | None = None) -> Tensor:
        """Return the weights; see `GramianWeighting.forward`.

        Raises:
            TypeError: no Gramian is given, or a dtype is not as stated.
            ValueError: a shape or device does not fit.
        """
        if gramian is None:
            raise TypeError("gramian: expected a tensor [K, K], found None")
        return gramian_weights(gramian, type(self).__name__, self.settings, present)

    @staticmethod
    def weigh(*args: Any, **kwargs: Any) -> Tensor:
        """Compute the weights of the active clusters, given `unit, number, ridge, *settings`.

        - unit: `UnitGramian`, the cosines and norms; of clusters that are not active the row of the identity and
          norm 1.
        - number: n, the present clusters, a scalar on the device.
        - ridge: above what the Gramian's rounding moves the eigenvalues of the cosines by; added to them, it makes
          them positive.
        - settings: those of the weighting.

        Returns:
            w, float64 [K]; what stands at clusters that are not active is not looked at.
        """
        raise NotImplementedError("expected a subclass that defines weigh(unit, number, ridge, *settings)")
