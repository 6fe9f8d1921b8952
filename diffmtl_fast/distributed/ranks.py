"""The collectives of a process group, and how a rank that fails tells the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .._host import upload
from .._torch import default_store, timeout_of
from .buckets import in_buckets
from .group_reference import GroupReference

_logger = logging.getLogger("diffmtl_fast")

#: Seconds that ranks wait for each other after a failed exchange, to name the one that is missing.
GRACE = 2.0
#: Seconds after which a rank that waits looks whether others have failed.
LOOK = 0.5

# Of a process group, the one of the same processes that is used here.
_own_groups: MutableMapping[dist.ProcessGroup, GroupReference] = WeakKeyDictionary()


@dataclass(frozen=True)
class Started:
    """An exchange that goes on while the host does other things.

    Attributes:
        is_over: tells whether `wait` would return at once.
        wait: waits for it; of an accelerator its stream does, and the host does not.
    """

    is_over: Callable[[], bool]
    wait: Callable[[], None]


class Ranks:
    """The processes of a group. Each of the methods is called by all of them, in the same order.

    What a method gives to all ranks has the same bits on all of them, sums included: each element of a sum is
    formed by one rank.

    Args:
        group: the process group.
        device: of the tensors that are exchanged.

    Attributes:
        rank: of this process in the group.
        size: how many processes there are.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._own, self.device = GroupReference(group), GroupReference(group), device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # Of every rank, where it says in the processes' store that an exchange has failed.
        self._failed = [f"diffmtl_fast/{group.group_name}/failed/{rank}" for rank in range(self.size)]

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            RuntimeError: it was destroyed.
        """
        return self._group()

    def are_of(self, group: dist.ProcessGroup) -> bool:
        """Tell whether they are the processes of a group."""
        return self._group.refers_to(group)

    def open_own_group(self) -> None:
        """Let all that follows go by a group of these processes' own, while others may use the given one."""
        if self.group not in _own_groups:
            members, timeout = dist.get_process_group_ranks(self.group), timeout_of(self.group, self.device)

            def make() -> None:
                own = dist.new_group(
                    members,
                    timeout=timeout,
                    backend=dist.get_backend(self.group),
                    use_local_synchronization=True,
                )
                _own_groups[self.group] = GroupReference(own)

            self._together(make)
        self._own = _own_groups[self.group]

    # Small things, and errors.

    def gather_objects(self, thing: Any) -> list[Any]:
        """Return every rank's object."""
        found: list[Any] = [None] * self.size
        self._together(lambda: dist.all_gather_object(found, thing, group=self._own()))
        return found

    def share(self, numbers: Tensor) -> Tensor:
        """Return every rank's numbers [n] as float64 [ranks, n], on the host, which waits for them.

        Raises:
            RuntimeError: a rank failed in `telling` instead.
        """
        return self._share(numbers, None)

    @contextmanager
    def telling(self, count: int) -> Iterator[None]:
        """Tell the others of an error inside, in the place of the `count` numbers that they expect in `share`."""
        try:
            yield
        except Exception as error:
            try:
                self._share(torch.zeros(count), f"{type(error).__name__}: {error}")
            except RuntimeError as lost:  # as it must: all ranks fail together, or the others are gone
                _logger.debug("rank %d told of its error: %s", self.rank, lost)
            raise

    def _share(self, numbers: Tensor, failure: str | None) -> Tensor:
        failed = torch.tensor([float(failure is not None)], dtype=torch.float64, device=self.device)
        own = torch.cat([numbers.to(self.device, torch.float64), failed])
        rows = torch.empty(self.size, len(own), dtype=torch.float64, device=self.device)
        self._together(lambda: dist.all_gather(list(rows), own, group=self._own(), async_op=True))
        rows = rows.cpu()
        if bool(rows[:, -1].any()):
            self._raise_failures(failure)
        return rows[:, :-1]

    def add_with_flags(
        self, numbers: Tensor, flags: Sequence[bool], failure: str | None = None
    ) -> tuple[Tensor, list[bool]]:
        """Add numbers up and exchange flags, in one exchange that the host waits for once.

        Args:
            numbers: [n].
            flags: as many on all ranks.
            failure: the error of this rank, which all others get to know.

        Returns:
            The sums over the ranks, float64 [n], and for every flag whether any rank has it.

        Raises:
            RuntimeError: a rank failed, this one or another.
        """
        told = upload(torch.tensor([*flags, failure is not None], dtype=torch.float64), self.device)
        both = torch.cat([numbers.to(self.device, torch.float64), told])
        self._together(lambda: dist.all_reduce(both, group=self._own(), async_op=True))
        found = (both[len(numbers) :] > 0).tolist()
        if found.pop():
            self._raise_failures(failure)
        return both[: len(numbers)], found

    def _raise_failures(self, failure: str | None) -> NoReturn:
        told = self.gather_objects(failure)
        errors = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None)
        raise RuntimeError(f"expected a step of all ranks, found that some failed in it: {errors}")

    def _together(self, collective: Callable[[], Any]) -> None:
        try:
            work = collective()
            if work is not None:
                self._wait(work)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: expected every rank to take part in the exchange of this step, "
                f"found that {self._missing()} has died, has not come within the process group's timeout, or "
                f"exchanges something else: {error}"
            ) from error

    def _wait(self, work: dist.Work) -> None:
        """Wait for a collective; on the host, no longer than until another rank's has failed."""
        if self.device.type != "cpu":
            work.wait()
            return
        while True:
            try:
                work.wait(timedelta(seconds=LOOK))
                return
            except RuntimeError:
                if work.is_completed() or any(default_store().check([key]) for key in self._failed):
                    raise

    def _missing(self) -> str:
        """Name the ranks that do not say within `GRACE` seconds that an exchange has failed for them, too."""
        try:
            store = default_store()
            store.set(self._failed[self.rank], "")
            end = time.monotonic() + GRACE
            while not all(there := [store.check([key]) for key in self._failed]) and time.monotonic() < end:
                time.sleep(0.05)
        except RuntimeError:  # the process that serves it, rank 0 unless there is a launcher, is gone
            return "one (perhaps that which serves the store, rank 0)"
        missing = [str(rank) for rank, found in enumerate(there) if not found]
        return f"rank {', '.join(missing)}" if missing else "one"

    # Tensors.

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor; all have its shape and dtype."""
        tensor = tensor.contiguous().clone()
        self._together(lambda: dist.broadcast(tensor, group=self._own(), group_src=0, async_op=True))
        return tensor

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by rank 0's."""
        self._in_buckets(
            tensors, lambda flat: dist.broadcast(flat, group=self._own(), group_src=0, async_op=True)
        )

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by their sums over the ranks."""
        self._in_buckets(tensors, lambda flat: dist.all_reduce(flat, group=self._own(), async_op=True))

    def _in_buckets(self, tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
        for bucket in in_buckets((t.dtype, t.numel() * t.element_size()) for t in tensors):
            members = [tensors[i] for i in bucket]
            flat = torch.cat([t.reshape(-1) for t in members])
            self._together(lambda flat=flat: collective(flat))  # type: ignore[misc]
            for tensor, part in zip(members, flat.split([t.numel() for t in members]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def start_exchange(self, parts: Tensor, received: Tensor, rows: Sequence[int]) -> Started:
        """Give every rank its part, and get what all ranks have for this one; see `Started`.

        An all-to-all, whose sum in rank order moves no more than a reduce-scatter (that of gloo moves twice as
        much), and of which every rank may have a number of rows of its own.

        Args:
            parts: [ranks, rows of this rank, n], contiguous.
            received: [rows of all ranks, n], contiguous, to be overwritten.
            rows: of every rank.
        """
        width = parts.shape[2]
        sizes, own = [count * width for count in rows], [parts[0].numel()] * self.size
        return self._start(
            lambda: dist.all_to_all_single(
                received.view(-1), parts.view(-1), sizes, own, group=self._own(), async_op=True
            )
        )

    def start_sum(self, tensor: Tensor) -> Started:
        """Overwrite a tensor by its sum over the ranks; see `Started`."""
        return self._start(lambda: dist.all_reduce(tensor, group=self._own(), async_op=True))

    def start_gather(self, part: Tensor, parts: Tensor) -> Started:
        """Write every rank's tensor to parts, [ranks, ...]; see `Started`."""
        return self._start(lambda: dist.all_gather(list(parts), part, group=self._own(), async_op=True))

    def _start(self, collective: Callable[[], Any]) -> Started:
        started: list[Any] = []
        self._together(lambda: started.append(collective()))
        (work,) = started
        return Started(work.is_completed, lambda: self._together(lambda: work))

    def gather(self, part: Tensor) -> Tensor:
        """Return every rank's tensor, [ranks, ...]."""
        parts = torch.empty(self.size, *part.shape, dtype=part.dtype, device=part.device)
        self._together(
            lambda: dist.all_gather(list(parts), part.contiguous(), group=self._own(), async_op=True)
        )
        return parts
