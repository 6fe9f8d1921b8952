"""``diffmtl-fast samplers``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from .._errors import UserError
from .._number_types import PositiveInt, Size
from ..diffusion.named_schedules import SCHEDULES
from .cluster import levels_of
from .runs import writing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..clustering import IntervalClustering

# What is shown of samplers that have no defaults, as shares of T where they are timesteps.
SHOWN_BETA = {"a": 1.5, "b": 1.0}
SHOWN_RANGES = ((0, 0.5, 1.0), (1000, 0.2, 1.0), (2000, 0.0, 1.0))
# Rounds of losses that are shown to samplers that follow them.
ROUNDS = 10


def samplers(
    scheduler: str = SCHEDULES[0], timesteps: Size = 1000, k: PositiveInt = 5, plot: str | None = None
) -> None:
    """Show which timesteps the samplers of training draw.

    The table has the share of every log-SNR cluster in what is drawn. Samplers that follow losses are shown after
    those of the best denoiser of white noise, SNR / (1 + SNR).

    Args:
        scheduler: squaredcos_cap_v2, linear, scaled_linear, or a .npy or .json file of log-SNR [T]
        timesteps: T of a named schedule
        k: number of log-SNR clusters
        plot: picture file of the probabilities of the timesteps
    """
    from .._errors import blame
    from ..clustering import cluster_snr

    levels = levels_of(scheduler, timesteps)
    with blame("k"):
        clusters = cluster_snr(levels, k)
    shown = probabilities(clusters, levels)
    if plot is not None:
        from ..run import plots

        with writing("plot", Path(plot)) as aside, blame("plot"):
            plots.samplers(aside, shown, clusters, f"timesteps that samplers draw, {scheduler}")
    print(table(shown, clusters))


def probabilities(
    clusters: IntervalClustering, log_snr: NDArray[np.float64]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The probabilities [T] of all samplers by name, and under it by what they depend on.

    Args:
        clusters: the tasks, and the clusters of the curriculum.
        log_snr: [T].
    """
    import torch

    from ..curriculum import DifficultyCurriculum, RangeSampler
    from ..train.components import build_timesteps
    from ..train.config import Config, Timesteps

    number = clusters.num_timesteps
    if number < 2:
        raise UserError(f"scheduler: expected at least 2 timesteps, found {number}")
    ranges = [[step, *(round(number * share) for share in ends)] for step, *ends in SHOWN_RANGES]
    arguments: dict[str, dict[str, Any]] = {"beta": SHOWN_BETA, "range": {"ranges": ranges}}
    t = torch.arange(number)
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name in get_args(get_args(get_type_hints(Timesteps)["sampler"])[0]):
        timesteps = Timesteps(sampler=name, args=arguments.get(name, {}))
        sampler = build_timesteps(Config(timesteps=timesteps), clusters, lambda: log_snr)
        if isinstance(sampler, RangeSampler):
            found[name] = {}
            for step in sampler.starts:
                sampler.steps = step
                found[name][f"from step {step}"] = sampler.density(t).numpy()
            continue
        for _ in range(ROUNDS if sampler.follows_losses else 0):
            sampler.update(torch.sigmoid(torch.from_numpy(log_snr)), t)
        found[name] = {"": sampler.density(t).numpy()}
    curriculum = DifficultyCurriculum(clusters)
    found["curriculum"] = {}
    for phase in range(1, clusters.k + 1):
        curriculum.current_phase.fill_(phase)
        found["curriculum"][f"phase {phase}"] = curriculum.density(t).numpy()
    return found


def table(shown: dict[str, dict[str, NDArray[np.float64]]], clusters: IntervalClustering) -> str:
    """One line per sampler: the share of each cluster in what it draws."""
    import numpy as np

    rows = [["sampler", *(f"cluster {j}" for j in range(clusters.k))]]
    for name, cases in shown.items():
        for case, values in cases.items():
            shares = np.add.reduceat(values, clusters.boundaries[:-1])
            rows.append([f"{name}, {case}" if case else name, *(f"{share:.3f}" for share in shares)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(lines)
