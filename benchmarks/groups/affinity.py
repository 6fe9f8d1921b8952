"""Task affinity of all pairs of timesteps: the published loops, one product of normalised gradients, and ours.

First the pairs of given gradients, with the product of all of them as the limit, then everything, the gradients
included. There the limit is one forward and backward over the same images at the same timesteps, whole batches at
a time, without keeping the gradients of the timesteps apart. The published time grows with T (gradients) and T²
(pairs). Where the pairs would take half a minute to hours, a part of them is timed and the time scaled up: the
only figures that are not measured in full, and marked as scaled.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.benchmark import Benchmark, Options
from benchmarks.harness import Candidate, wall_clock
from benchmarks.models import DiT, sinusoidal
from benchmarks.names import DIGITS_DIT, OURS, POINTS, PUBLISHED, SCALED, STUDY_UNET, Group
from benchmarks.reference import pairwise_cosines, timestep_gradients
from benchmarks.report.results import Role
from diffmtl_fast import ops
from diffmtl_fast._extras import require
from diffmtl_fast.analysis import task_affinity
from diffmtl_fast.analysis.rows import cosines
from diffmtl_fast.study.plan import bundled

PRODUCT = "G @ G.T"
LIMIT, BY_HAND, VMAP = "gradient of everything", f"normalise, then {PRODUCT}", f"vmap(grad), then {PRODUCT}"
TOLERANCE = 1e-4  # float32 gradients of two ways of running the model
PAIR_TOLERANCE = 1e-3  # float32 sums over millions of elements
PART = (24, 48)  # random timesteps whose cosines with random others are formed, and those others
BATCH = 128
MEMORY = 36 * 2**30  # bytes, half of them for the gradients that are kept
SAMPLES = 8  # of a timestep; fewer than in the public script


class Problem:
    """A model on the same images and noise at every timestep, so that all ways see the same.

    Args:
        model: makes the model.
        shape: of an image.
        timesteps: T.
        samples: images.
        device: where model and images are.
        batch: most images in a pass of those ways that take several timesteps at once.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        shape: tuple[int, ...],
        timesteps: int,
        samples: int,
        device: torch.device,
        batch: int = BATCH,
    ) -> None:
        torch.manual_seed(0)
        self.model = model().to(device)
        self.scheduler = require("diffusers", "train").DDPMScheduler(
            timesteps, beta_schedule="squaredcos_cap_v2"
        )
        self.images = (torch.rand(samples, *shape) * 2 - 1).to(device)
        self.noise = torch.randn(samples, *shape).to(device)
        self.timesteps, self.samples, self.device, self.batch = timesteps, samples, device, batch
        self.part = _part(timesteps)

    @cached_property
    def exact(self) -> NDArray[np.float64]:
        """The cosines by their definition in float64, of one backward after the other."""
        return _exact(self.gradients())

    @cached_property
    def exact_part(self) -> NDArray[np.float64]:
        """The same of a part of the pairs."""
        left, right = self.part
        return _exact(self.gradients(right))[: len(left)]

    def loss(self, model: Callable[..., Any], t: Tensor, generator: object = None) -> Tensor:
        index = torch.arange(len(t), device=self.device) % self.samples
        noise = self.noise[index]
        noisy = self.scheduler.add_noise(self.images[index], noise, t)
        output = model(noisy, t)
        return ops.sample_mse(output if isinstance(output, Tensor) else output.sample, noise)

    def gradients(self, timesteps: Sequence[int] | None = None) -> list[Tensor]:
        """One backward after the other, a batch for each timestep."""
        timesteps = range(self.timesteps) if timesteps is None else timesteps

        def losses(t: int) -> list[Tensor]:
            return [self.loss(self.model, torch.full((self.samples,), t, device=self.device)).mean()]

        return timestep_gradients(self.model, losses, timesteps)

    def published(self) -> NDArray[np.float64]:
        """The cosine of every pair by itself."""
        return pairwise_cosines(self.gradients()).numpy()

    def published_part(self) -> Scaled:
        """The published loops over a part of the timesteps and pairs."""
        left, right = self.part
        gradients: list[Tensor] = []
        forming = wall_clock(lambda: gradients.extend(self.gradients(right)))
        pairs = _published_pairs(gradients[: len(left)], gradients, self.timesteps)
        return Scaled(forming * self.timesteps / len(right) + pairs.seconds, pairs.cosines)

    def part_in_words(self) -> str:
        """What `published_part` does."""
        return (
            f"the time of {len(self.part[1])} of {self.timesteps:,} gradients and of "
            f"{_pairs_in_words(self.part, self.timesteps)}, random ones, scaled by their numbers"
        )

    def by_hand(self) -> NDArray[np.float64]:
        """The same gradients; the pairs in one product."""
        unit = F.normalize(torch.stack(self.gradients()), dim=1)
        return (unit @ unit.T).numpy()

    def by_vmap(self) -> NDArray[np.float64]:
        """The gradients of many timesteps at once, as many as fill a batch; the pairs in one product."""
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}

        def loss(parameters: dict[str, Tensor], t: Tensor) -> Tensor:
            def model(*inputs: Tensor) -> Any:
                return functional_call(self.model, parameters, inputs)

            return self.loss(model, t.expand(self.samples)).mean()

        at_once = vmap(grad(loss), in_dims=(None, 0), chunk_size=max(1, self.batch // self.samples))
        found = at_once(parameters, torch.arange(self.timesteps, device=self.device))
        unit = F.normalize(torch.cat([g.flatten(1) for g in found.values()], dim=1), dim=1)
        return (unit @ unit.T).cpu().numpy()

    def ours(self) -> NDArray[np.float64]:
        return task_affinity(
            self.model,
            self.loss,
            self.timesteps,
            samples=self.samples,
            batch_size=self.batch,
            memory=MEMORY,
        ).cosines

    def ours_in_files(self) -> NDArray[np.float64]:
        """The gradients of so many timesteps and parameters need not fit into memory."""
        with tempfile.TemporaryDirectory() as folder:
            return task_affinity(
                self.model,
                self.loss,
                self.timesteps,
                samples=self.samples,
                batch_size=self.batch,
                folder=folder,
            ).cosines

    def limit(self) -> None:
        """Differentiate by all parameters at once."""
        images = self.timesteps * self.samples
        for start in range(0, images, self.batch):
            sample = torch.arange(start, min(start + self.batch, images), device=self.device)
            self.loss(self.model, sample // self.samples).sum().backward()
        self.model.zero_grad(set_to_none=True)


class Given:
    """Random gradients [T, P], one per timestep.

    Args:
        timesteps: T.
        parameters: P.
        device: where they are.
    """

    def __init__(self, timesteps: int, parameters: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gradients = torch.randn(timesteps, parameters, generator=generator).to(device)
        self.part = _part(timesteps)

    @cached_property
    def exact_part(self) -> NDArray[np.float64]:
        """The cosines of a part of the pairs by their definition in float64."""
        left, right = self.part
        return _exact([self.gradients[t] for t in right])[: len(left)]

    def published_part(self) -> Scaled:
        """The published loop over a part of the pairs."""
        left, right = ([self.gradients[t] for t in timesteps] for timesteps in self.part)
        return _published_pairs(left, right, len(self.gradients))

    def part_in_words(self) -> str:
        """What `published_part` does."""
        pairs = _pairs_in_words(self.part, len(self.gradients))
        return f"the time of {pairs}, random ones, scaled by their number"

    def by_hand(self) -> NDArray[np.float64]:
        """All pairs in one product."""
        unit = F.normalize(self.gradients, dim=1)
        return (unit @ unit.T).cpu().numpy()

    def ours(self) -> NDArray[np.float64]:
        """As `task_affinity` forms them."""
        return cosines(ops.gram(self.gradients).double().cpu().numpy())


def _part(timesteps: int) -> tuple[list[int], list[int]]:
    """Random timesteps, and those that they are paired with."""
    chosen = np.random.default_rng(0).permutation(timesteps)[: PART[1]].tolist()
    return chosen[: PART[0]], chosen


def _pairs_in_words(part: tuple[list[int], list[int]], timesteps: int) -> str:
    return f"{len(part[0]) * len(part[1]):,} of {timesteps**2:,} pairs"


def _published_pairs(left: list[Tensor], right: list[Tensor], timesteps: int) -> Scaled:
    """The published loop over some pairs, scaled to all of those of so many timesteps."""
    found: list[Tensor] = []
    seconds = wall_clock(lambda: found.append(pairwise_cosines(left, right)))
    return Scaled(seconds * timesteps**2 / (len(left) * len(right)), found[0].numpy())


@dataclass(frozen=True)
class Scaled:
    """The result of a part of some work, and the time that all of it would take.

    Attributes:
        seconds: that all of it would take.
        cosines: the result of the part.
    """

    seconds: float
    cosines: NDArray[np.float64]


def _clock(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds of a run; of one that did a part of the work, those that all of it would take."""
    results: list[object] = []
    seconds = wall_clock(lambda: results.append(run()), repeats)
    scaled = [result.seconds for result in results if isinstance(result, Scaled)]
    return float(np.mean(scaled)) if scaled else seconds


def _exact(gradients: list[Tensor]) -> NDArray[np.float64]:
    unit = F.normalize(torch.stack([g.double() for g in gradients]), dim=1, eps=0.0)
    return (unit @ unit.T).numpy()


def _unet(channels: tuple[int, int]) -> nn.Module:
    """A small UNet of diffusers."""
    return require("diffusers", "train").UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


class _Points(nn.Module):
    """A denoiser of points in the plane: residual layers, 37,890 parameters."""

    def __init__(self, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.input, self.time, self.output = nn.Linear(2, width), nn.Linear(32, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.input(x) + self.time(sinusoidal(t, 32))
        for layer in self.layers:
            hidden = hidden + layer(F.silu(hidden))
        output: Tensor = self.output(F.silu(hidden))
        return output


def _study_unet() -> nn.Module:
    """The denoiser of the bundled study, without its classes."""
    arguments = bundled()["base"]["model"]["args"] | {"num_class_embeds": None}
    return require("diffusers", "train").UNet2DModel(**arguments)


def _digits_dit() -> nn.Module:
    """The DiT of the other benchmarks, 4.1 million parameters, for images of 8×8: 16 tokens."""
    return DiT(channels=1, size=8)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    timesteps = options.pick(50, 1000)
    for parameters in options.pick((1000,), (160_000,), (5_000, 20_000, 160_000, 700_000)):
        yield _pairs(options, timesteps, parameters)
    channels, samples = options.pick((8, 8), (16, 32)), options.pick(2, SAMPLES)
    for timesteps in options.pick((12,), (100,), (100, 300, 1000)):
        yield _benchmark(options, channels, timesteps, samples)
    if not options.quick:
        yield _thousand(options, POINTS, _Points, (2,), 1000, in_files=False, batch=1024, rounds=9)
    if options.full:
        yield _thousand(options, STUDY_UNET, _study_unet, (1, 8, 8), 1000, in_files=False)
        # 16.4 GB of gradients: kept in files where memory is short.
        small = _physical_memory() < 22 * 2**30
        yield _thousand(options, DIGITS_DIT, _digits_dit, (1, 8, 8), 1000, in_files=small)


def _pairs(options: Options, timesteps: int, parameters: int) -> Benchmark:
    """Given gradients: the pairs alone."""

    def build() -> list[Candidate]:
        given = Given(timesteps, parameters, torch.device(options.device))

        def gated(name: str, run: Callable[[], NDArray[np.float64]]) -> Candidate:
            def error() -> float:
                return float(np.abs(run()[np.ix_(*given.part)] - given.exact_part).max())

            return Candidate(name, run, error, TOLERANCE)

        def published_error() -> float:
            return float(np.abs(given.published_part().cosines - given.exact_part).max())

        def notes() -> dict[str, Any]:
            return {"scaled": [given.part_in_words()]}

        return [
            Candidate(PRODUCT, lambda: given.gradients @ given.gradients.T),
            gated(OURS, given.ours),
            gated(BY_HAND, given.by_hand),
            Candidate(SCALED, given.published_part, published_error, PAIR_TOLERANCE, notes=notes),
        ]

    return Benchmark(
        Group.AFFINITY,
        f"pairs of {timesteps:,} given gradients of {parameters:,} elements",
        {PRODUCT: "limit", OURS: "ours", BY_HAND: "baseline", SCALED: "reference"},
        build,
        options.pick(2, 5),
        {"T": timesteps, "parameters": parameters, "given": "gradients"},
        clock=_clock,
        allowance=math.inf,
    )


def _benchmark(options: Options, channels: tuple[int, int], timesteps: int, samples: int) -> Benchmark:
    ways: dict[str, Role] = {LIMIT: "limit", OURS: "ours", PUBLISHED: "reference"}
    ways |= {BY_HAND: "baseline", VMAP: "baseline"}

    return Benchmark(
        Group.AFFINITY,
        f"UNet of {channels[0]} and {channels[1]} channels, T = {timesteps}, {samples} images each",
        ways,
        partial(_unet_candidates, channels, timesteps, samples, torch.device(options.device)),
        options.pick(2, 3),
        {"T": timesteps, "samples": samples},
        {"TorchJD, LibMTL": "have no task affinity"},
        memory=options.full,
        allowance=4.0,
        grace=10.0,
        warmup=0,
    )


def _unet_candidates(
    channels: tuple[int, int], timesteps: int, samples: int, device: torch.device
) -> list[Candidate]:
    problem = Problem(lambda: _unet(channels), (1, 8, 8), timesteps, samples, device)

    def gated(name: str, run: Callable[[], NDArray[np.float64]], peer: bool = False) -> Candidate:
        def error() -> float:
            return float(np.abs(run() - problem.exact).max())

        return Candidate(name, run, error, TOLERANCE, peer)

    return [
        Candidate(LIMIT, problem.limit),
        gated(OURS, problem.ours),
        gated(PUBLISHED, problem.published),
        gated(BY_HAND, problem.by_hand),
        gated(VMAP, problem.by_vmap, peer=True),  # has no rule for some operations
    ]


def _thousand(
    options: Options,
    name: str,
    model: Callable[[], nn.Module],
    shape: tuple[int, ...],
    timesteps: int,
    *,
    in_files: bool,
    batch: int = BATCH,
    rounds: int = 3,
) -> Benchmark:
    """Ours in full beside the published loops, of which a part is timed."""

    def build() -> list[Candidate]:
        problem = Problem(model, shape, timesteps, SAMPLES, torch.device(options.device), batch)
        run = problem.ours_in_files if in_files else problem.ours

        def ours_error() -> float:
            return float(np.abs(run()[np.ix_(*problem.part)] - problem.exact_part).max())

        def published_error() -> float:
            return float(np.abs(problem.published_part().cosines - problem.exact_part).max())

        def notes() -> dict[str, Any]:
            return {"scaled": [problem.part_in_words()]}

        return [
            Candidate(LIMIT, problem.limit),
            Candidate(OURS, run, ours_error, TOLERANCE),
            Candidate(SCALED, problem.published_part, published_error, PAIR_TOLERANCE, notes=notes),
        ]

    return Benchmark(
        Group.AFFINITY,
        f"{name}, T = {timesteps:,}, {SAMPLES} {'images' if len(shape) == 3 else 'points'} each",
        {LIMIT: "limit", OURS: "ours", SCALED: "reference"},
        build,
        rounds,
        {"T": timesteps, "samples": SAMPLES, "model": name},
        clock=_clock,
        allowance=math.inf,
        warmup=0,
    )
