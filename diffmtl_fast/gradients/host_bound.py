"""Whether a GPU waits for the host: found in a few steps without waiting for either."""

from __future__ import annotations

import torch

from .._host import pins

# Steps that are passed over, in which libraries choose kernels and memory is allocated, and those that are asked.
SKIPPED = 32
ASKED = 16


class HostBound:
    """Asks in each of `ASKED` steps, once the host has launched the Gramian, whether the backward is over by then.

    A GPU that has more to do than the host has launched is still in the backward. One that never is waits for the
    next launch.

    Attributes:
        found: None until all have been asked, then whether the backward was over each time.
    """

    def __init__(self) -> None:
        self.found: bool | None = None
        self._seen = 0
        self._backward: torch.Event | None = None

    def note_backward(self, device: torch.device) -> None:
        """Take in that the host has launched a backward."""
        self._backward = None
        if self.found is not None or not pins(device):
            return
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self._seen += 1
        if self._seen > SKIPPED:
            self._backward = torch.Event(device)
            self._backward.record()

    def note_gramian(self) -> None:
        """Take in that the host has launched the Gramian; weightings, which may wait, have not run yet."""
        if self._backward is None:
            return
        if not self._backward.query():
            self.found = False
        elif self._seen >= SKIPPED + ASKED:
            self.found = True
        self._backward = None
