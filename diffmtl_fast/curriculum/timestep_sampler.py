"""What a timestep sampler is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._host import upload
from ..clustering.drawing import hand_over, places, random_integers
from ..distributed import GroupReference, Ranks, find_group
from ._levels import Clustering, check_clustering

_DRAW_RANGE = 2**52  # the midpoint of each of these many cells of (0, 1) is a float64


class TimestepSampler(nn.Module):
    """Draws the timesteps, or continuous noise levels, of a training batch.

    All samplers are used alike, so that one loop serves them all::

        t, cluster = sampler.sample(batch_size, device=device)
        ...                                        # loss [B] of the samples
        mtl.backward(loss * sampler.weight(t))
        sampler.update(loss.detach(), t)           # after the weights were used

    Levels are drawn on the host, or on the device whose generator is given. A sampler that defines `update`
    learns from losses (unless its `follows_losses` is false) and draws on their device in any case, from the
    generator's random numbers. State is kept in buffers, where levels are drawn, and `state_dict` resumes to the
    same bits. Nothing waits for the device, as long as `update` gets losses from the device that `sample` was
    asked for.

    Args:
        clusters: the tasks, whose index `sample` returns beside each level. They also tell what ordinary
            training is: timesteps 0 … T-1 drawn uniformly, continuous levels from the clustering's
            distribution. A plain loop, which averages over the batch, passes a single cluster, such as
            ``cluster_timesteps(T, 1)``.
        generator: source of randomness; its state is part of `state_dict`. Default: the one passed to
            `sample`, or else the global one of where levels are drawn.
        process_group: processes that train together, such as ``torch.distributed.group.WORLD``; all of them make
            the sampler and call its methods, each with the same batch size and its own losses. They draw from one
            stream, that of the first one's generator (by default one on the CPU, seeded by its global one), every
            process other levels of one batch, and learn from the losses of all, so that their states stay the
            same. Default: this process draws and learns by itself.

    Attributes:
        tasks: the clustering whose index `sample` returns.

    Raises:
        TypeError: `clusters` is no clustering.
        ValueError: this process does not belong to `process_group`.
    """

    def __init__(
        self,
        clusters: Clustering,
        *,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_clustering("clusters", clusters)
        self.tasks = clusters
        self.generator = generator
        given = None if process_group is None else GroupReference(process_group)
        self._group = given if given is not None and find_group(given) is not None else None
        if self._group is not None:
            self.generator = _common_generator(Ranks(self._group(), torch.device("cpu")), generator)
        self.register_buffer("_anchor", torch.empty(0), persistent=False)  # tells the device of the buffers
        self._anchor: Tensor

    @property
    def follows_losses(self) -> bool:
        """Whether what it draws depends on losses, which the host could not read without waiting."""
        return type(self).update is not TimestepSampler.update

    def sample(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Draw the levels of a batch and their clusters.

        Args:
            batch_size: number of levels, at least 1; with a process group those of this process, the same on all.
            device: where the batch goes; by default the generator's device, or the CPU.
            generator: source of randomness, on the CPU or on the device; by default the sampler's own, or else
                the global one of where levels are drawn. What is drawn on the CPU spares an accelerator's
                training step a host synchronisation: see `ClusteredMTL.forward`.
            dtype: of continuous levels; timesteps are int64.

        Returns:
            Levels and their clusters (int64), both [batch_size], sorted by cluster.

        Raises:
            ValueError: ``batch_size < 1``, or a generator on another device, or one beside a process group.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        if generator is not None and self._group is not None:
            raise ValueError(
                "generator: expected none with process_group, whose processes draw from the sampler's own, found "
                "one"
            )
        generator = self.generator if generator is None else generator
        target, source = places(device, generator)
        if self.follows_losses:
            source = target
        if self._anchor.device != source:
            self.to(source)
        ranks = self._ranks(source)
        number = 1 if ranks is None else ranks.size
        level = self._draw(batch_size * number, source, generator, dtype)
        cluster, order = self.tasks.assign(level).sort(stable=True)
        own = slice(0 if ranks is None else ranks.rank, None, number)  # as many of each cluster as the others
        return hand_over(level[order[own]], cluster[own].contiguous(), target)

    def _ranks(self, device: torch.device) -> Ranks | None:
        return None if self._group is None else Ranks(self._group(), device)

    def density(self, level: Tensor) -> Tensor:
        """How often the next `sample` draws a level.

        Args:
            level: timesteps or continuous levels, any shape.

        Returns:
            Probability of timesteps (float64), probability density of continuous levels (their dtype), same
            shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must define density(level)")

    def weight(self, level: Tensor) -> Tensor:
        """Factors for the losses of levels that were drawn, before they are averaged.

        1 wherever the distribution is meant to change what is learned. A sampler that draws some levels more
        often only to lower the variance returns the importance weights that make up for it.

        Args:
            level: levels from `sample`, any shape.

        Returns:
            float32, same shape and device.
        """
        return torch.ones(level.shape, dtype=torch.float32, device=level.device)

    def update(self, loss: Tensor, level: Tensor | None = None) -> None:
        """Learn from the losses of an optimizer step; most samplers have nothing to learn.

        Args:
            loss: losses [B] of the samples, without the factors of `weight`. Processes that train together pass
                their own if they have a process group (see the class), and else the same ones, for example those
                gathered from all of them, to draw from the same distribution.
            level: their levels [B].
        """

    def gather(self, loss: Tensor, level: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the losses and levels of all processes, for `update`: in the order in which one would have them.

        Without a process group, those that are given. With one, every process calls it; the host waits for the
        device once.

        Args:
            loss: [B], of this process; B may be another one on others.
            level: [B], or None on all processes.
        """
        ranks = self._ranks(loss.device)
        if ranks is None:
            return loss, level
        sizes = ranks.share(torch.tensor([float(len(loss))]))[:, 0].long().tolist()
        columns = [loss.detach()] if level is None else [loss.detach(), level]
        own = loss.new_zeros(len(columns), max(sizes), dtype=torch.float64)
        own[:, : len(loss)] = torch.stack([column.double() for column in columns])
        rows = ranks.gather(own).permute(1, 2, 0).flatten(1)  # sample i of every process, then sample i + 1
        there = torch.tensor([i < size for i in range(max(sizes)) for size in sizes])
        rows = rows[:, upload(there.nonzero().flatten(), loss.device)]
        return rows[0].to(loss.dtype), None if level is None else rows[1].to(level.dtype)

    def _draw(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None, dtype: torch.dtype
    ) -> Tensor:
        """Levels [batch_size] on the device, in any order. The generator may be on the CPU: `random_integers`."""
        raise NotImplementedError(f"{type(self).__name__} must define _draw")

    def get_extra_state(self) -> dict[str, Any]:
        """Return the generator's state for `state_dict`."""
        return {"generator": None if self.generator is None else self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the generator's state from `state_dict`.

        Raises:
            ValueError: one of the two, the saved sampler and this one, has a generator and the other has not.
        """
        saved = state["generator"]
        if (saved is None) != (self.generator is None):
            here, there = ("without", "with") if self.generator is None else ("with", "without")
            raise ValueError(
                f"{type(self).__name__}: expected a state saved {here} a generator, found one saved {there}"
            )
        if self.generator is not None:
            self.generator.set_state(saved.cpu())

    def extra_repr(self) -> str:
        """Show the tasks."""
        return f"tasks={self.tasks!r}"


def _common_generator(ranks: Ranks, generator: torch.Generator | None) -> torch.Generator:
    """Return a generator in the same state on all ranks: that of rank 0's."""
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    generator.set_state(ranks.gather_objects(generator.get_state())[0])
    return generator


def cumulative(probabilities: Tensor) -> Tensor:
    """Cumulative probabilities [N] that end at exactly 1, for `draw_categories`."""
    sums = probabilities.cumsum(0)
    return sums / sums[-1:]


def draw_categories(
    thresholds: Tensor, count: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Draw indices, int64 [count], from their `cumulative` probabilities [N]."""
    cell = random_integers(_DRAW_RANGE, (count,), device, generator)
    share = (cell.double() + 0.5) / _DRAW_RANGE
    return torch.searchsorted(thresholds, share, right=True)


def check_sample_losses(loss: Tensor, level: Tensor | None) -> None:
    """Refuse anything but floating-point losses [B] with their levels [B]."""
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        found = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss: expected a floating-point tensor [B], found {found}")
    if level is None or loss.dim() != 1 or loss.shape != level.shape:
        levels = "no levels" if level is None else f"levels {list(level.shape)}"
        raise ValueError(f"loss: expected [B] with the levels [B], found {list(loss.shape)} with {levels}")
