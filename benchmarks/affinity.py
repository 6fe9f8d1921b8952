"""Task affinity of 1,000 timesteps beside the published loop over all pairs.

    python -m benchmarks.affinity [--quick]

Writes results/affinity.json. Our time is measured in full. The published procedure would take too long: its parts,
the gradients of all timesteps and the cosines of all pairs, are timed on a subset before and after ours, and the
smaller time of each is scaled up to T timesteps and T² pairs. The cosines of the subset have to agree.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from diffmtl_fast import ops
from diffmtl_fast._extras import require
from diffmtl_fast.analysis import affinity, task_affinity

from .harness import RESULTS, GateError, environment
from .reference import pairwise_cosines, timestep_gradients

TOLERANCE = 1e-4  # float32 gradients of two ways of running the model


@dataclass(frozen=True)
class Result:
    """Seconds at T timesteps, the published ones scaled up from a subset; the largest difference of a cosine."""

    parameters: int
    timesteps: int
    samples: int
    subset: int
    published_gradients: float
    published_pairs: float
    ours_gradients: float
    ours_pairs: float
    error: float

    @property
    def ratios(self) -> tuple[float, float]:
        """Of the pairs alone, and of the whole."""
        published = self.published_gradients + self.published_pairs
        return self.published_pairs / self.ours_pairs, published / (self.ours_gradients + self.ours_pairs)

    def row(self) -> str:
        """Format as a row of a Markdown table."""
        pairs, whole = self.ratios
        return (
            f"| {self.parameters:,} | {self.samples} | {self.published_gradients:,.0f} + "
            f"{self.published_pairs:,.0f} s | {self.ours_gradients:,.1f} + {self.ours_pairs:,.1f} s | "
            f"{pairs:,.0f} | {whole:,.0f} | {self.error:.1e} |"
        )


class Problem:
    """A small UNet of diffusers on the same images and noise at every timestep, so that both ways see the same."""

    def __init__(self, channels: tuple[int, int], timesteps: int, samples: int) -> None:
        diffusers = require("diffusers", "train")
        torch.manual_seed(0)
        self.model: nn.Module = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
        self.scheduler = diffusers.DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2")
        self.images, self.noise = torch.rand(samples, 1, 8, 8) * 2 - 1, torch.randn(samples, 1, 8, 8)
        self.timesteps, self.samples = timesteps, samples

    def loss(self, model: Callable[..., Any], t: Tensor, generator: object = None) -> Tensor:
        index = torch.arange(len(t)) % self.samples
        noise = self.noise[index]
        noisy = self.scheduler.add_noise(self.images[index], noise, t)
        return ops.sample_mse(model(noisy, t).sample, noise)

    def published(self, timesteps: list[int]) -> list[Tensor]:
        """The gradients, one batch per timestep: the samples are fewer than a batch of the public script's."""

        def losses(t: int) -> list[Tensor]:
            return [self.loss(self.model, torch.full((self.samples,), t)).mean()]

        return timestep_gradients(self.model, losses, timesteps)


def compare(channels: tuple[int, int], timesteps: int, samples: int, subset: int) -> Result:
    """Measure both ways on one model.

    Raises:
        GateError: the cosines of the subset differ.
    """
    problem = Problem(channels, timesteps, samples)
    chosen = np.linspace(0, timesteps - 1, subset).astype(int).tolist()
    problem.published(chosen[:2])
    before = _time_published(problem, chosen)
    spent = [0.0]

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = gram(*args)
        spent[0] += time.perf_counter() - start
        return result

    gram = affinity.gram
    width = sum(p.numel() for p in problem.model.parameters())
    start = time.perf_counter()
    with patch.object(affinity, "gram", timed):
        found = task_affinity(
            problem.model, problem.loss, timesteps, samples=samples, memory=3 * timesteps * width * 4
        )
    ours = time.perf_counter() - start
    after = _time_published(problem, chosen)
    error = float(np.abs(found.cosines[np.ix_(chosen, chosen)] - before[2].numpy()).max())
    if not error <= TOLERANCE:
        raise GateError(f"expected cosines equal to within {TOLERANCE}, found a difference of {error:.3g}")
    return Result(
        width,
        timesteps,
        samples,
        subset,
        min(before[0], after[0]) * timesteps / subset,
        min(before[1], after[1]) * (timesteps / subset) ** 2,
        ours - spent[0],
        spent[0],
        error,
    )


def _time_published(problem: Problem, chosen: list[int]) -> tuple[float, float, Tensor]:
    """Seconds for the gradients of the subset and for its pairs, and the cosines."""
    start = time.perf_counter()
    gradients = problem.published(chosen)
    middle = time.perf_counter()
    scores = pairwise_cosines(gradients)
    return middle - start, time.perf_counter() - middle, scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few timesteps, to see that it runs")
    quick = parser.parse_args().quick
    measured_in = environment()
    sizes = [(8, 8)] if quick else [(16, 32), (32, 64), (48, 96)]
    results = []
    print("| parameters | samples | published (extrapolated) | ours | pairs | whole | error |")
    print("|---|---|---|---|---|---|---|")
    for channels in sizes:
        results.append(compare(channels, 50 if quick else 1000, 8, 10 if quick else 40))
        print(results[-1].row(), flush=True)
    if quick:
        return
    record = {"environment": measured_in, "results": [asdict(result) for result in results]}
    path = RESULTS / "affinity.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
