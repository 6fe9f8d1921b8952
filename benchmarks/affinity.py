"""Task affinity of all pairs of timesteps: the published loops, one product of normalised gradients, and ours.

The limit is one forward and backward over the same images at the same timesteps, whole batches at a time, without
telling the timesteps apart. The published time grows with T (gradients) and T² (pairs); nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.harness import Candidate
from benchmarks.reference import pairwise_cosines, timestep_gradients
from benchmarks.suite import Benchmark, Options
from diffmtl_fast import ops
from diffmtl_fast._extras import require
from diffmtl_fast.analysis import task_affinity
from diffmtl_fast.bench.results import Role

GROUP = "task affinity"
LIMIT, OURS, PUBLISHED, BY_HAND, VMAP = (
    "gradient of everything",
    "diffmtl_fast",
    "published",
    "normalise, then G @ G.T",
    "vmap(grad), then G @ G.T",
)
TOLERANCE = 1e-4  # float32 gradients of two ways of running the model
BATCH = 128
SAMPLES = 8  # fewer than a batch of the public script's


class Problem:
    """A small UNet of diffusers on the same images and noise at every timestep, so that all ways see the same."""

    def __init__(self, channels: tuple[int, int], timesteps: int, samples: int, device: torch.device) -> None:
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
        ).to(device)
        self.scheduler = diffusers.DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2")
        self.images = (torch.rand(samples, 1, 8, 8) * 2 - 1).to(device)
        self.noise = torch.randn(samples, 1, 8, 8).to(device)
        self.timesteps, self.samples, self.device = timesteps, samples, device

    @cached_property
    def exact(self) -> NDArray[np.float64]:
        """The cosines by their definition in float64, of one backward after the other."""
        gradients = torch.stack([g.double() for g in self.gradients()])
        unit = gradients / gradients.norm(dim=1, keepdim=True)
        return (unit @ unit.T).numpy()

    def loss(self, model: Callable[..., Any], t: Tensor, generator: object = None) -> Tensor:
        index = torch.arange(len(t), device=self.device) % self.samples
        noise = self.noise[index]
        noisy = self.scheduler.add_noise(self.images[index], noise, t)
        return ops.sample_mse(model(noisy, t).sample, noise)

    def gradients(self) -> list[Tensor]:
        """One backward after the other, a batch for each timestep."""

        def losses(t: int) -> list[Tensor]:
            return [self.loss(self.model, torch.full((self.samples,), t, device=self.device)).mean()]

        return timestep_gradients(self.model, losses, range(self.timesteps))

    def published(self) -> NDArray[np.float64]:
        """The cosine of every pair by itself."""
        return pairwise_cosines(self.gradients()).numpy()

    def by_hand(self) -> NDArray[np.float64]:
        """The same gradients; the pairs in one product."""
        unit = nn.functional.normalize(torch.stack(self.gradients()), dim=1)
        return (unit @ unit.T).numpy()

    def by_vmap(self) -> NDArray[np.float64]:
        """The gradients of many timesteps at once, as many as fill a batch; the pairs in one product."""
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss(parameters: dict[str, Tensor], t: Tensor) -> Tensor:
            def model(*inputs: Tensor) -> Any:
                return functional_call(self.model, parameters, inputs)

            return self.loss(model, t.expand(self.samples)).mean()

        at_once = vmap(grad(loss), in_dims=(None, 0), chunk_size=max(1, BATCH // self.samples))
        found = at_once(parameters, torch.arange(self.timesteps, device=self.device))
        unit = nn.functional.normalize(torch.cat([g.flatten(1) for g in found.values()], dim=1), dim=1)
        return (unit @ unit.T).cpu().numpy()

    def ours(self) -> NDArray[np.float64]:
        return task_affinity(
            self.model, self.loss, self.timesteps, samples=self.samples, batch_size=BATCH
        ).cosines

    def limit(self) -> None:
        """Differentiate by all parameters at once."""
        for start in range(0, self.timesteps * self.samples, BATCH):
            sample = torch.arange(
                start, min(start + BATCH, self.timesteps * self.samples), device=self.device
            )
            self.loss(self.model, sample // self.samples).sum().backward()
        self.model.zero_grad(set_to_none=True)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    channels, samples = options.pick((8, 8), (16, 32)), options.pick(2, SAMPLES)
    for timesteps in options.pick((12,), (100,), (100, 300, 1000)):
        yield _benchmark(options, channels, timesteps, samples)


def _benchmark(options: Options, channels: tuple[int, int], timesteps: int, samples: int) -> Benchmark:
    ways: dict[str, Role] = {LIMIT: "limit", OURS: "ours", PUBLISHED: "reference"}
    ways |= {BY_HAND: "baseline", VMAP: "baseline"}

    def build() -> list[Candidate]:
        problem = Problem(channels, timesteps, samples, torch.device(options.device))

        def gated(name: str, run: Callable[[], NDArray[np.float64]], peer: bool = False) -> Candidate:
            def error() -> float:
                return float(np.abs(run() - problem.exact).max())

            return Candidate(name, run, error, TOLERANCE, peer)

        return [
            Candidate(LIMIT, problem.limit),
            gated(OURS, problem.ours),
            gated(PUBLISHED, problem.published),
            gated(BY_HAND, problem.by_hand),
            gated(VMAP, problem.by_vmap, peer=True),  # which has no rule for every operation
        ]

    return Benchmark(
        GROUP,
        f"UNet of {channels[0]} and {channels[1]} channels, T = {timesteps}, {samples} images each",
        ways,
        build,
        options.pick(2, 3),
        {"T": timesteps, "samples": samples},
        {"TorchJD, LibMTL": "have no task affinity"},
        memory=options.full,
        allowance=4.0,
        grace=10.0,
        warmup=0,
    )
