"""A process group as it is kept from step to step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class GroupReference:
    """A process group for as long as it exists; copies refer to the same one, and it stays in its process.

    Whoever keeps a group itself keeps its threads after `torch.distributed.destroy_process_group`, until the
    interpreter ends. A thread of gloo that then gives a tensor back aborts the process.

    Args:
        group: the process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        # What PyTorch gives processes outside of a group is none; `find_group` refuses it.
        self._group: Callable[[], dist.ProcessGroup | None] = (
            weakref.ref(group) if isinstance(group, dist.ProcessGroup) else lambda: group
        )

    def __call__(self) -> dist.ProcessGroup:
        """Return the group.

        Raises:
            RuntimeError: it was destroyed.
        """
        group = self._group()
        if group is None:
            raise RuntimeError("process_group: expected one that exists, found that it was destroyed")
        return group

    def refers_to(self, group: dist.ProcessGroup) -> bool:
        """Tell whether this is the reference of a group."""
        return self._group() is group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupReference:
        return self

    def __reduce__(self) -> str:
        """Refuse to be pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "process_group: expected none in what is pickled, found one, which exists in its own process alone; "
            "save the state_dict() of model and weighting"
        )
