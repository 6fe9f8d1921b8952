"""Task affinity: how well the gradients of different timesteps agree."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._files import replacing
from .._progress import NoProgress, Progress, open_progress
from ..clustering import IntervalClustering
from ..gradients import ClusterJacobian
from ..gradients.engine import EngineName
from .projection import RandomProjection, cosine_error_bound
from .rows import Rows, cosines, gram, new_rows

#: (model, t, generator) to the losses [B] of samples at the timesteps t, int64 [B]
TimestepLoss: TypeAlias = Callable[[Callable[..., Any], Tensor, torch.Generator], Tensor]
#: Puts the weights of a checkpoint into the model.
LoadWeights: TypeAlias = Callable[[nn.Module], object]
Array: TypeAlias = "NDArray[np.float64]"

# Of norms between these, products are in float32's range, and so are those of all elements that matter.
_NORMS = (1e-10, 1e10)
_CURRENT = "current"  # the name of the only checkpoint if there is none


@dataclass(frozen=True)
class TaskAffinity:
    """Cosines between the gradients of denoising tasks.

    Attributes:
        tasks: the timesteps of each of the n tasks.
        checkpoints: names of the checkpoints.
        by_checkpoint: float64 [checkpoints, n, n], each symmetric with ones on the diagonal.
        error_bound: bound on the root mean square error that random projection makes in any one cosine, over the
            draw of the projection; 0 without one. How much the cosines vary with the samples comes on top.
        reliability: float64 [checkpoints, n], of every gradient: the share of its squared norm that is not the
            noise of the samples, estimated from two halves of them, and below 0 by chance where there is hardly
            any. None if it was not measured.
    """

    tasks: IntervalClustering
    checkpoints: tuple[str, ...]
    by_checkpoint: Array
    error_bound: float = 0.0
    reliability: Array | None = None

    @property
    def cosines(self) -> Array:
        """The task affinity scores: the mean over the checkpoints, float64 [n, n]."""
        return self.by_checkpoint.mean(0)

    @property
    def disattenuated(self) -> TaskAffinity:
        """The cosines of the gradients that infinitely many samples would have.

        Independent noise leaves the product of two gradients as it is in the mean and makes both longer, which
        draws their cosine c_ij towards 0, the more the lower their reliabilities r_i, r_j. Spearman's correction
        for attenuation is c_ij / √(r_i r_j), and 1 for i = j; chance may take it beyond ±1, and where a
        reliability is not above 0 it is NaN. Source: Spearman, "The proof and measurement of association between
        two things", American Journal of Psychology 15, 1904.

        Raises:
            ValueError: reliabilities were not measured.
        """
        if self.reliability is None:
            raise ValueError("disattenuated: expected a measurement with reliability=True, found one without")
        root = np.sqrt(np.where(self.reliability > 0.0, self.reliability, math.nan))
        corrected = self.by_checkpoint / (root[:, :, None] * root[:, None])
        diagonal = np.arange(self.tasks.k)
        corrected[:, diagonal, diagonal] = 1.0
        return replace(self, by_checkpoint=corrected)

    @property
    def matrix(self) -> Array:
        """`cosines` with every timestep in its task's place, float64 [T, T]: what `cluster_affinity` takes."""
        task = np.repeat(np.arange(self.tasks.k), self.tasks.sizes)
        return self.cosines[np.ix_(task, task)]

    def save(self, path: str | Path) -> None:
        """Write `matrix` to a .npy file, whole or not at all."""
        with replacing(Path(path)) as aside:
            _save(aside, self.matrix)


def task_affinity(
    model: nn.Module,
    loss: TimestepLoss,
    tasks: int | IntervalClustering,
    *,
    checkpoints: Mapping[str, LoadWeights] | None = None,
    samples: int = 16,
    batch_size: int = 128,
    strided: bool = False,
    projection: int | None = None,
    reliability: bool = False,
    folder: str | Path | None = None,
    memory: int = 2 * 2**30,
    engine: EngineName = "auto",
    seed: int = 0,
    progress: bool = False,
) -> TaskAffinity:
    """Measure the task affinity scores of all pairs of tasks.

    TAS(i, j) is the cosine of ∇_θ L_i and ∇_θ L_j, the gradients of the mean losses of two timesteps by all
    trainable parameters, averaged over the checkpoints of a run (Go et al., "Addressing Negative Transfer in
    Diffusion Models", NeurIPS 2023, arXiv 2306.00354). A pass forms the gradients of as many tasks as fill a
    batch; their Gramian holds all pairs.

    The samples of a gradient make it noisy, which draws the cosines of different tasks towards 0, and not those of
    all tasks alike: compare matrices of equally many samples, or `TaskAffinity.disattenuated`.

    Args:
        model: as it is in training; its mode is left as it is, its weights are put back afterwards.
        loss: called as ``loss(model, t, generator)`` with int64 timesteps [B], task by task, on the model's
            device; draws B samples and their noise from the generator (there too), calls ``model(...)`` on them in
            that order and returns the losses [B], each of its own sample alone. It has to do the same for the same
            generator. B may differ from call to call.
        tasks: T, for a task per timestep, or a clustering for a task per interval, such as
            ``cluster_timesteps(1000, 100)``; the timestep of every sample is drawn from its interval.
        checkpoints: functions by name that load the weights to measure; default the weights as they are.
        samples: samples per task. The paper's public script takes 1,000.
        batch_size: most samples per pass. Activations take memory accordingly.
        strided: evaluate the middle timestep of every interval alone, not all of them.
        projection: keep D random combinations of the elements of each gradient, a power of two such as 4096, in
            place of the gradient. The root mean square error of a cosine ρ is at most (2 + √2) / √D, and typically
            (1 − ρ²) / √D; see `RandomProjection`. Default: exact.
        reliability: measure the reliabilities too, by a gradient for each half of a task's samples, from the same
            passes: every other sample is of the second half. Takes memory for twice as many gradients in a pass.
        folder: where finished blocks of gradients are kept until their Gramian is done, and then the Gramian's
            cosines, so that an interrupted call with the same arguments goes on where it was. They take n · P
            elements, or n · D, of one checkpoint.
        memory: bytes for gradients. Without a folder those of all n tasks have to fit into half of it.
        engine: see `ClusteredMTL`.
        seed: of the samples and the projection, which are the same for all checkpoints.
        progress: show progress on standard output.

    Returns:
        The cosines by checkpoint.

    Raises:
        TypeError, ValueError: an argument is not as stated; the gradients do not fit; the loss of a task has no
            gradient, or one that is not finite; the folder holds something else.
    """
    tasks = _as_tasks(tasks)
    for name, value in (("samples", samples), ("batch_size", batch_size), ("memory", memory)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, found {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, found {seed!r}")
    if reliability and samples % 2:
        raise ValueError(f"samples: expected an even number, for two halves, found {samples}")
    if checkpoints is not None and not checkpoints:
        raise ValueError("checkpoints: expected at least one, found none")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected at least one parameter that requires a gradient, found none")
    parts = 2 if reliability else 1
    plan = _plan(parameters, tasks, samples, batch_size, parts, projection, memory, folder is not None)
    measure = _Measurement(model, loss, tasks, plan, strided, engine, seed)
    names = tuple(checkpoints or [_CURRENT])
    record = None if folder is None else _Record(Path(folder), measure.settings(names))
    before = {name: value.clone() for name, value in model.state_dict().items()} if checkpoints else None
    report = open_progress(len(names) * tasks.k, unit="tasks") if progress else NoProgress()
    found = []
    try:
        with closing(report):
            for index, name in enumerate(names):
                if checkpoints is not None:
                    checkpoints[name](model)
                found.append(measure.checkpoint(index, name, record, report))
    finally:
        if before is not None:
            model.load_state_dict(before)
    by_checkpoint, reliabilities = (np.stack(values) for values in zip(*found, strict=True))
    return TaskAffinity(tasks, names, by_checkpoint, plan.error_bound, reliabilities if reliability else None)


@dataclass(frozen=True)
class _Plan:
    """How the work is cut up: the numbers that decide which samples are drawn and what is kept of them."""

    width: int  # P
    passes: tuple[int, ...]  # samples per task in each pass over the tasks of a block
    block: int  # tasks per pass
    parts: int  # gradients per task, each of as many of its samples
    projection: int | None

    @property
    def error_bound(self) -> float:
        return 0.0 if self.projection is None else cosine_error_bound(self.projection)


def _plan(
    parameters: Sequence[nn.Parameter],
    tasks: IntervalClustering,
    samples: int,
    batch_size: int,
    parts: int,
    projection: int | None,
    memory: int,
    in_files: bool,
) -> _Plan:
    width, size = sum(p.numel() for p in parameters), max(4, *(p.element_size() for p in parameters))
    each = min(samples, batch_size)
    full, rest = divmod(samples, each)
    gradient = 3 * parts * width * size  # in the Jacobian, its matrix, and a copy on the way to what is kept
    if gradient > memory / 2:
        raise ValueError(
            f"memory: expected at least {_gib(2 * gradient)} for one gradient of {width:,} elements, "
            f"found {_gib(memory)}"
        )
    kept = tasks.k * (projection or width) * size
    if not in_files and kept > memory / 2:
        raise ValueError(
            f"memory: expected at least {_gib(2 * kept)} for the gradients of {tasks.k} tasks, found "
            f"{_gib(memory)}; give a folder to keep them in files, fewer tasks, or a projection"
        )
    block = max(1, min(tasks.k, batch_size // each, int(memory / 2 / gradient)))
    return _Plan(width, (each,) * full + ((rest,) if rest else ()), block, parts, projection)


class _Measurement:
    """The work that is the same for every checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        loss: TimestepLoss,
        tasks: IntervalClustering,
        plan: _Plan,
        strided: bool,
        engine: EngineName,
        seed: int,
    ) -> None:
        self.model, self.loss, self.tasks, self.plan = model, loss, tasks, plan
        self.strided, self.seed = strided, seed
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = parameters[0].device
        self.dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        self.jacobian = ClusterJacobian(model, plan.block * plan.parts, engine=engine)
        self._memory: Tensor | None = None

    def settings(self, names: Sequence[str]) -> dict[str, Any]:
        """What a result depends on, for a later run to compare."""
        halves = {"parts": self.plan.parts} if self.plan.parts > 1 else {}
        return {
            "boundaries": self.tasks.boundaries.tolist(),
            "checkpoints": list(names),
            "passes": list(self.plan.passes),
            "tasks_per_pass": self.plan.block,
            "parameters": self.plan.width,
            "projection": self.plan.projection,
            "strided": self.strided,
            "seed": self.seed,
            **halves,
        }

    def checkpoint(
        self, index: int, name: str, record: _Record | None, report: Progress
    ) -> tuple[Array, Array]:
        """The cosines [n, n] of the weights that the model has now, and reliabilities [n], NaN without halves."""
        total, done = self.tasks.k, index * self.tasks.k
        folder = None if record is None else record.folder(index, name, self.model)
        finished = None if folder is None else folder / "cosines.npy"
        firsts, project = range(0, total, self.plan.block), self._projection()
        reliability = None
        if self.plan.parts == 2:
            reliability = Rows(folder, torch.empty(total, 1, dtype=torch.float64), "reliability")
        if finished is not None and finished.exists():
            report.update(done + total, f"{name}: found")
            return np.load(finished), self._reliability(reliability, firsts)
        rows = Rows(folder, self._memory_of(total if folder is None else self.plan.block))
        for first in firsts:
            if not rows.has(first):
                kept, reliable = self._rows(first, project, rows)
                # The rows come last: their presence says that both are there.
                if reliability is not None:
                    reliability.put(first, reliable)
                rows.put(first, kept)
            report.update(min(done + first + self.plan.block, done + total), name)
        found = cosines(gram(rows.blocks(firsts), self.device))
        if finished is not None:
            with replacing(finished) as aside:
                _save(aside, found)
        rows.clear()
        return found, self._reliability(reliability, firsts)

    def _memory_of(self, number: int) -> Tensor:
        """Memory for so many rows, the same for all checkpoints: it costs most when it is first written."""
        if self._memory is None:
            self._memory = new_rows((number, self.plan.projection or self.plan.width), self.dtype)
        return self._memory

    def _reliability(self, blocks: Rows | None, firsts: Sequence[int]) -> Array:
        if blocks is None:
            return np.full(self.tasks.k, math.nan)
        return np.concatenate(blocks.blocks(firsts))[:, 0]

    def _projection(self) -> RandomProjection | None:
        size = self.plan.projection
        return None if size is None else RandomProjection(self.plan.width, size, self.seed, self.device)

    def _rows(self, first: int, project: RandomProjection | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """What is kept of the gradients of the tasks first, first + 1, … of a block, and reliabilities."""
        number, parts = min(self.plan.block, self.tasks.k - first), self.plan.parts
        done, samples = 0, sum(self.plan.passes)
        for turn, each in enumerate(self.plan.passes):
            generator = torch.Generator(self.device).manual_seed(_seed(self.seed, first, turn))
            task = torch.arange(number, device=self.device).repeat_interleave(each)
            t = self._timesteps(task + first, generator)
            part = torch.arange(done, done + each, device=self.device) % parts
            share = (part.bincount(minlength=parts).double() * parts / samples)[part].repeat(number)
            done += each

            def losses(run: Callable[..., Any], t: Tensor = t, share: Tensor = share) -> Tensor:
                found = self.loss(run, t, generator)  # noqa: B023 (called before the next turn)
                return found * share.to(found.dtype)

            self.jacobian(losses, task * parts + part.repeat(number), add=turn > 0)
        gradients = self.jacobian.matrix(self._place(first, number, rows))
        reliability = gradients.new_full((number,), math.nan, dtype=torch.float64)
        if parts == 2:
            gradients, reliability = _mean_of_halves(gradients.unflatten(0, (number, 2)))
        norms = torch.linalg.vector_norm(gradients, dim=1)
        if not bool(((norms > _NORMS[0]) & (norms < _NORMS[1])).all()):
            self._rescale(gradients, first)
        return (gradients if project is None else project(gradients)), reliability[:, None]

    def _rescale(self, gradients: Tensor, first: int) -> None:
        """Divide gradients by their largest elements, which leaves the cosines as they are, or refuse them."""
        largest = torch.linalg.vector_norm(gradients, ord=math.inf, dim=1)
        for wrong, what in ((~largest.isfinite(), "that is not finite"), (largest == 0, "of zeros")):
            if bool(wrong.any()):
                left, right = self.tasks.boundaries[first + int(wrong.nonzero()[0]) :][:2]
                raise ValueError(
                    f"loss: expected a gradient for timesteps {left} to {right - 1}, found one {what}"
                )
        gradients /= largest[:, None]

    def _place(self, first: int, number: int, rows: Rows) -> Tensor:
        """Memory for the gradients of a block: where they are kept, if they are kept as they are."""
        shape = number * self.plan.parts, self.plan.width
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        as_they_are = self.plan.parts == 1 and self.plan.projection is None
        return rows.vacant(first, number) if as_they_are else new_rows(shape, self.dtype)

    def _timesteps(self, task: Tensor, generator: torch.Generator) -> Tensor:
        if not self.strided:
            return self.tasks.draw(task, task + 1, generator=generator)
        middle = (self.tasks.boundaries[:-1] + self.tasks.boundaries[1:]) // 2
        return torch.from_numpy(middle).to(self.device)[task]


class _Record:
    """The folder of a measurement, for an interrupted one to go on.

    Raises:
        ValueError: it holds a measurement with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        _agree(path / "settings.json", settings)

    def folder(self, index: int, name: str, model: nn.Module) -> Path:
        """Where the blocks of a checkpoint go, after a look whether they would be of the same weights."""
        folder = self._path / f"checkpoint-{index}"
        folder.mkdir(exist_ok=True)
        _agree(folder / "weights.json", {"checkpoint": name, "sha256": _digest(model)})
        return folder


def _agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings down, or compare them with those that are written."""
    if not path.exists():
        with replacing(path) as aside:
            aside.write_text(json.dumps(settings))
        return
    found = json.loads(path.read_text())
    for key, value in settings.items():
        if found.get(key) != value:
            raise ValueError(
                f"folder {path.parent}: expected {key} as in the measurement that it holds, {found.get(key)}, "
                f"found {value}; continue with the same arguments, or use another folder"
            )


def _digest(model: nn.Module) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _mean_of_halves(halves: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [n, P] of gradients [n, 2, P], and its reliability, float64 [n]."""
    first, second = halves.unbind(1)
    noise = (first - second) / 2
    mean = first - noise
    # first · second = ‖mean‖² − ‖noise‖², in whose mean no noise is left.
    squares = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square() for x in (noise, mean)]
    return mean, 1.0 - squares[0] / squares[1]


def _as_tasks(tasks: int | IntervalClustering) -> IntervalClustering:
    if isinstance(tasks, IntervalClustering):
        return tasks
    if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
        raise ValueError(f"tasks: expected a number of timesteps >= 1, or a clustering, found {tasks!r}")
    return IntervalClustering(np.arange(tasks + 1))


def _seed(*numbers: int) -> int:
    """A seed for each of the things that are drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _save(path: Path, array: Array) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _gib(size: float) -> str:
    return f"{math.ceil(size / 2**30 * 100) / 100} GiB"
