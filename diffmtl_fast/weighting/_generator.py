"""The random numbers of a weighting: a generator whose state is part of the weighting's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DrawsNumbers(nn.Module):
    """Mixed into a weighting that draws random numbers, so that a resumed run repeats them.

    Args:
        generator: draws the numbers, on its own device. Its state is part of `state_dict`. None: torch's default
            generator.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def source(self, device: torch.device | str) -> torch.device | str:
        """Where numbers for a device are drawn: on the generator's device, where there is one."""
        return device if self.generator is None else self.generator.device

    def get_extra_state(self) -> Tensor | None:
        """Return the generator's state for `state_dict`."""
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Restore the generator's state from `state_dict`.

        Raises:
            ValueError: one of the two, the saved weighting and this one, has a generator and the other has not.
        """
        if (state is None) != (self.generator is None):
            saved, here = (
                ("without" if state is None else "with"),
                ("without" if self.generator is None else "with"),
            )
            raise ValueError(
                f"{type(self).__name__}: expected a state saved {here} a generator, found one saved {saved}"
            )
        if self.generator is not None and state is not None:
            self.generator.set_state(state.cpu())
