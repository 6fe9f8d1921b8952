"""``diffmtl-fast analyze``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .._number_types import PositiveFloat, PositiveInt, Seed, Size, UnitFloat
from .runs import path_of


def affinity(
    run_dir: str,
    checkpoint: str | None = None,
    device: str = "auto",
    tasks: PositiveInt | None = None,
    strided: bool = False,
    samples: Size = 16,
    batch_size: Size = 128,
    projection: PositiveInt | None = None,
    disattenuate: bool = False,
    memory: PositiveFloat = 2.0,
    seed: Seed = 0,
) -> None:
    """Measure the task affinity: the cosine of the gradients of two timesteps, of all pairs.

    It is averaged over the run's checkpoints. The T x T matrix goes to affinity.npy, for --clusters.cost affinity,
    with a picture. An interrupted call goes on where it was if it is repeated.

    Args:
        run_dir: folder of the run
        checkpoint: name of the checkpoint to use, not all that the run keeps
        device: auto, cpu, cuda or cuda:N
        tasks: groups of consecutive timesteps; a task per timestep if not given
        strided: of every group, the middle timestep alone stands for it
        samples: images per task
        batch_size: most images per pass
        projection: random combinations kept per gradient, a power of two such as 4096; exact if not given
        disattenuate: correct the cosines for the noise of few images, which two halves of them tell; writes
            affinity-disattenuated.*
        memory: for gradients, in GiB
        seed: of images, noise and projection
    """
    from ..train import run_analysis
    from ..train.folder import RunFolder

    _tell(
        run_analysis.affinity(
            RunFolder(Path(run_dir)),
            device,
            path_of(checkpoint),
            tasks=tasks,
            strided=strided,
            samples=samples,
            batch_size=batch_size,
            projection=projection,
            disattenuate=disattenuate,
            memory=int(memory * 2**30),
            seed=seed,
        )
    )


def negative_transfer(
    run_dir: str,
    checkpoint: str | None = None,
    device: str = "auto",
    intervals: PositiveInt = 5,
    cost: Literal["timestep", "snr"] = "timestep",
    iterations: PositiveInt | None = None,
    expert_iteration: PositiveInt | None = None,
    num: Size | None = None,
    steps: Size | None = None,
    resamples: Size = 1000,
    seed: Seed = 0,
) -> None:
    """Measure the negative transfer gap of every interval of timesteps.

    That is the Fréchet distance of pictures that an expert, trained on the interval alone, denoises inside it and
    the run elsewhere, minus the run's own. Below 0 the other tasks' training does harm. Experts are trained where
    they are missing, and an interrupted call goes on where it was if it is repeated.

    Args:
        run_dir: folder of the run
        checkpoint: name of the checkpoint to use, not the newest
        device: auto, cpu, cuda or cuda:N
        intervals: number of intervals, an expert for each
        cost: what the intervals hold together; timestep: equal lengths
        iterations: of every expert; as many as the run's if not given
        expert_iteration: take the experts as they were after so many iterations, which they keep a checkpoint of;
            after the run's iterations over the number of intervals they had seen their timesteps as often as the
            run has. Writes negative-transfer-at-N
        num: pictures drawn with every model; the run's own if not given
        steps: denoising steps; the run's own if not given
        resamples: of the bootstrap, for the 95 % intervals
        seed: of the pictures' noise and of the bootstrap
    """
    from ..train import run_analysis
    from ..train.config import Clusters
    from ..train.folder import RunFolder

    _tell(
        run_analysis.negative_transfer(
            RunFolder(Path(run_dir)),
            device,
            path_of(checkpoint),
            intervals=Clusters(cost, intervals),
            iterations=iterations,
            expert_iteration=expert_iteration,
            num=num,
            steps=steps,
            resamples=resamples,
            seed=seed,
        )
    )


def difficulty(
    run_dir: str,
    device: str = "auto",
    intervals: PositiveInt = 5,
    cost: Literal["timestep", "snr"] = "timestep",
    iterations: PositiveInt | None = None,
    fraction: UnitFloat = 0.9,
) -> None:
    """Measure the difficulty of the run's tasks in two ways.

    One is the convergence of experts, each trained on an interval of timesteps alone (the same as those of
    negative-transfer); the other is the relative entropy of neighbouring noise levels. Experts are trained where
    they are missing.

    Args:
        run_dir: folder of the run
        device: auto, cpu, cuda or cuda:N
        intervals: number of intervals, an expert for each
        cost: what the intervals hold together; timestep: equal lengths
        iterations: of every expert; as many as the run's if not given
        fraction: of the loss's fall, whose iterations are reported
    """
    from ..train import run_analysis
    from ..train.config import Clusters
    from ..train.folder import RunFolder

    _tell(
        run_analysis.difficulty(
            RunFolder(Path(run_dir)),
            device,
            intervals=Clusters(cost, intervals),
            iterations=iterations,
            fraction=fraction,
        )
    )


def _tell(written: list[Path]) -> None:
    for path in written:
        print(f"wrote {path}")


ANALYSES: dict[str, tuple[Callable[..., None], str]] = {
    "affinity": (affinity, "cosines between the gradients of all pairs of timesteps"),
    "negative-transfer": (negative_transfer, "what experts of an interval do better than the run"),
    "difficulty": (difficulty, "how fast each interval is learned, and how far apart its levels lie"),
}
