"""Samples by index, batches of them, and the order in which training visits them."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

#: What a sample is drawn for: nothing, a class, a caption, or an embedding [L, D].
Condition: TypeAlias = "int | str | Tensor | None"
#: Of a batch: nothing, classes int64 [B], captions, or embeddings [B, L, D].
Conditions: TypeAlias = "Tensor | list[str] | None"

# What decoders raise for a file that they cannot read.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, KeyError)


@dataclass(frozen=True)
class Batch:
    """A batch of clean samples.

    Attributes:
        x: float32 [B, C, H, W].
        conditioning: what the samples are conditioned on, see `Conditions`.
        unreadable: names of samples that could not be read, with the reason; others took their places.
    """

    x: Tensor
    conditioning: Conditions = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which copies to a GPU need not be waited for; the DataLoader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, move: Any) -> Batch:
        held = self.conditioning
        return replace(self, x=move(self.x), conditioning=move(held) if isinstance(held, Tensor) else held)


def refuse_classes(batch: Batch, num_classes: int) -> None:
    """Refuse classes that the data do not have, before a GPU looks for them in an embedding.

    Raises:
        ValueError: there are such.
    """
    found = batch.conditioning
    if not isinstance(found, Tensor) or found.dim() != 1 or not num_classes:
        return
    low, high = found.min().item(), found.max().item()
    if found.is_floating_point() or low < 0 or high >= num_classes:
        raise ValueError(f"expected integer classes 0 ... {num_classes - 1}, found {low} to {high}")


class Items(Protocol):
    """Samples by index."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def item(self, index: int, source: random.Random | None) -> tuple[Tensor, Condition]:
        """A sample, float32 [C, H, W] in [-1, 1] for images; augmented if a source of randomness is given."""
        ...

    def name(self, index: int) -> str:
        """What to call a sample in messages: its file."""
        ...


class Memory:
    """Samples in memory.

    Args:
        x: float32 [N, C, H, W].
        conditions: int64 [N], floating point [N, L, D], N captions, or None.
    """

    def __init__(self, x: Tensor, conditions: Conditions = None) -> None:
        self.x, self.conditions = x, conditions

    def __len__(self) -> int:
        return len(self.x)

    def item(self, index: int, source: random.Random | None) -> tuple[Tensor, Condition]:
        """A sample; nothing is augmented."""
        return self.x[index], None if self.conditions is None else self.conditions[index]

    def batch(self, indices: list[int]) -> Batch:
        """Several samples at once."""
        held, index = self.conditions, torch.tensor(indices)
        return Batch(
            self.x[index],
            [held[i] for i in indices] if isinstance(held, list) else held if held is None else held[index],
        )

    def name(self, index: int) -> str:
        """Its number."""
        return f"image {index}"


class Subset:
    """Some of other samples.

    Args:
        items: the others.
        indices: int64 [M], which.
    """

    def __init__(self, items: Items, indices: Any) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int, source: random.Random | None) -> tuple[Tensor, Condition]:
        """The sample itself."""
        return self.items.item(int(self.indices[index]), source)

    def name(self, index: int) -> str:
        """Its name."""
        return self.items.name(int(self.indices[index]))


class Visits(Dataset[Batch]):
    """Batches of visits: visit v is sample v % N, augmented by random numbers that v alone decides.

    An unreadable sample is replaced by the next one that is readable, and named in the batch.

    Args:
        items: the samples.
        seed: of the augmentation; None for none.
    """

    def __init__(self, items: Items, seed: int | None) -> None:
        self.items, self.seed = items, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, visits: list[int]) -> Batch:
        """The batch of some visits.

        Raises:
            ValueError: no sample can be read, or two differ in shape.
        """
        if isinstance(self.items, Memory):
            size = len(self.items)
            return self.items.batch([visit % size for visit in visits])
        unreadable: dict[str, str] = {}
        found = [self._read(visit, unreadable) for visit in visits]
        shapes = {tuple(x.shape) for x, _ in found}
        if len(shapes) > 1:
            raise ValueError(f"data: expected samples of one shape, found {sorted(shapes)}")
        return Batch(torch.stack([x for x, _ in found]), stacked([c for _, c in found]), unreadable)

    def __getitem__(self, visit: int) -> Batch:
        return self.__getitems__([visit])

    def _read(self, visit: int, unreadable: dict[str, str]) -> tuple[Tensor, Condition]:
        for step in range(len(self.items)):
            found = read(self.items, visit, self.seed, unreadable, step)
            if found is not None:
                return found
        raise ValueError(f"data: expected a readable sample, found none among {len(self.items)}")


def read(
    items: Items, visit: int, seed: int | None, unreadable: dict[str, str], step: int = 0
) -> tuple[Tensor, Condition] | None:
    """The sample of a visit; None if it cannot be read.

    Args:
        items: N samples.
        visit: epoch · N + index.
        seed: of the augmentation, which differs from visit to visit; None for none.
        unreadable: receives the name of a sample that cannot be read, with the reason.
        step: take the sample so many places after the visit's.
    """
    index = (visit + step) % len(items)
    source = None if seed is None else random.Random(f"{seed} {visit}")
    try:
        return sound(items.item(index, source))
    except UNREADABLE as error:
        unreadable[items.name(index)] = str(error) or type(error).__name__
        return None


class UnreadableSamples:
    """Names the samples that cannot be read, each once, up to a limit.

    Args:
        limit: how many there may be.
        names: those known before.
    """

    def __init__(self, limit: int, names: Iterable[str] = ()) -> None:
        self.limit, self.names = limit, set(names)

    def add(self, found: dict[str, str]) -> None:
        """Log the new ones, given with the reason.

        Raises:
            ValueError: there are more than the limit.
        """
        for name, reason in found.items():
            if name not in self.names:
                logging.getLogger("diffmtl_fast").warning(
                    "left out %s, which cannot be read: %s", name, reason
                )
            self.names.add(name)
            if len(self.names) > self.limit:
                raise ValueError(
                    f"unreadable: expected at most {self.limit} files that cannot be read, found one more: "
                    f"{name} ({reason})"
                )


class EpochOrder(Sampler[list[int]]):
    """Every sample once an epoch, in a new order every time, as endless batches of visits.

    A batch may reach into the next epoch. The order follows from the seed and the epoch alone, so that training
    goes on anywhere, with any number of workers, from the number of batches it has seen.

    Args:
        size: N.
        batch_size: samples of a process's batch.
        seed: of the orders.
        start: batches to leave out.
        rank: of this process; the batches of all processes together are consecutive.
        world: number of processes.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        position = (self.start * self.world + self.rank) * self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            visits = []
            for place in range(position, position + self.batch_size):
                if place // self.size != epoch:
                    epoch = place // self.size
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
                visits.append(epoch * self.size + int(order[place % self.size]))
            yield visits
            position += self.world * self.batch_size


def batches(
    items: Items, order: EpochOrder, *, augment: bool = True, workers: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """Endless batches in an order.

    Args:
        items: the samples.
        order: of the visits.
        augment: with augmentation by the seed of the order.
        workers: processes that read ahead.
        pin: into page-locked memory, for a GPU.
    """
    loader = DataLoader(
        Visits(items, order.seed if augment else None),
        batch_sampler=order,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=as_it_is,
        worker_init_fn=_outlive_a_signal,
        # Of its own: torch's global one decides dropout masks, whatever the number of workers.
        generator=torch.Generator().manual_seed(order.seed),
    )
    return iter(loader)


def _outlive_a_signal(worker: int) -> None:
    """Let a worker outlive the first Ctrl-C or SIGTERM, as the run does, which wants the rest of its batches.

    Terminals and job schedulers send them to all processes of a run.
    """

    def once(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, once)


def sound(sample: Any) -> tuple[Tensor, Condition]:
    """A sample as it is.

    Raises:
        TypeError: it is none.
        ValueError: it is not finite.
    """
    x = sample[0] if isinstance(sample, tuple) and len(sample) == 2 else None
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() != 3:
        found = type(sample).__name__ if not isinstance(x, Tensor) else f"{x.dtype} {list(x.shape)}"
        raise TypeError(f"expected samples (float32 [C, H, W], condition), found {found}")
    if not x.isfinite().all():
        raise ValueError("expected finite values, found NaN or infinity")
    return sample


def as_it_is(batch: Any) -> Any:
    """For a DataLoader whose dataset makes whole batches."""
    return batch


def stacked(conditions: list[Any]) -> Conditions:
    """Those of a batch, from those of its samples.

    Raises:
        ValueError: two embeddings differ in shape.
    """
    if conditions[0] is None or isinstance(conditions[0], str):
        return None if conditions[0] is None else conditions
    found = [torch.as_tensor(condition) for condition in conditions]
    shapes = {tuple(each.shape) for each in found}
    if len(shapes) > 1:
        raise ValueError(f"data: expected embeddings of one shape, found {sorted(shapes)}")
    return torch.stack(found)
