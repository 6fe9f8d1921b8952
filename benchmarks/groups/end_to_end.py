"""Training to a fixed loss on real digits: what a step costs, times how many steps it takes.

All ways start from the same weights and see the same batches in a round, others in the next. Training stops at the
first check at which the loss on held-out images, the mean over the clusters at fixed timesteps and noise, has
fallen to the target; the checks are not timed. The gate sees that the first steps lower that loss; a training that
does not get to the target fails when it is timed. What a step of the bundled trainer costs is in `trainer`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import diffmtl_fast as dm
from benchmarks.benchmark import Benchmark, Options
from benchmarks.groups import trainer
from benchmarks.harness import Candidate, GateError
from benchmarks.models import Case
from benchmarks.names import (
    AUTOJAC_PCGRAD,
    K_BACKWARDS_PCGRAD,
    OURS,
    SLICES_PCGRAD,
    TYPICAL_K,
    UNCERTAINTY,
    Group,
)
from benchmarks.reference import Batch, pcgrad_step, plain_step, random_orders, uw_step
from benchmarks.report.results import Role
from benchmarks.step_implementations import project_by_hand, slice_batches, stacked
from diffmtl_fast._extras import require
from diffmtl_fast.diffusion import log_snr

K = TYPICAL_K
PLAIN, PUBLISHED_UNCERTAINTY = "plain training", "uncertainty weighting, published"
Update = Callable[[nn.Module, Batch], object]


@dataclass(frozen=True)
class Scale:
    """How large the training is.

    Attributes:
        channels: of the UNet's two levels.
        batch: samples per step.
        target: loss at which it ends.
        every: steps between two checks.
        most: steps after which it has failed.
    """

    channels: tuple[int, int]
    batch: int
    target: float
    every: int
    most: int


class Problem:
    """The data, the initial weights and the loss that has to fall."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        diffusers = require("diffusers", "train")
        from diffmtl_fast.train.data import digits

        torch.manual_seed(0)
        self.scale, self.device = scale, device
        self.model = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=scale.channels,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        ).to(device)
        self.scheduler = diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
        self.clusters = dm.cluster_snr(log_snr(self.scheduler), k=K)
        data = digits()
        self.images, held_out = data.train, data.test
        generator = torch.Generator().manual_seed(2**31 - 1)  # a seed that no round has
        self.held_out = self._batch(held_out[:250], generator)
        self.initial = self.check(self.model)

    def _batch(self, images: Tensor, generator: torch.Generator) -> Batch:
        t, cluster = self.clusters.sample(len(images), device=self.device, generator=generator)
        noise = torch.randn(images.shape, generator=generator).to(self.device)
        noisy = self.scheduler.add_noise(images.to(self.device), noise, t)
        return Batch((noisy, t), noise, cluster)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Draw batches without end, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.images), (self.scale.batch,), generator=generator)
            yield self._batch(self.images[chosen], generator)

    @staticmethod
    def losses(model: Callable[..., Any], batch: Batch, **extra: Any) -> Tensor:
        """Return the losses of the samples, [B]."""
        return dm.ops.sample_mse(model(*batch.inputs, return_dict=False, **extra)[0], batch.target)

    @torch.no_grad()
    def check(self, model: nn.Module) -> float:
        """Return the loss on held-out images, the mean of the clusters'."""
        losses = self.losses(model, self.held_out)
        return float(dm.ops.cluster_mean(losses, self.held_out.cluster, K).mean())


class Training:
    """One way of training; a run of it takes the time until the target."""

    def __init__(self, problem: Problem, prepare: Callable[[nn.Module], tuple[Update, list[Tensor]]]) -> None:
        self.problem, self.prepare, self.seed = problem, prepare, 0
        self.steps: list[int] = []

    def begin(self, turn: int) -> None:
        """Choose the batches of a round."""
        self.seed = turn

    def run(self) -> float:
        """Train until the target; return the seconds that the steps took."""
        return self.train(self.problem.scale.most, self.problem.scale.target)

    def train(self, most: int, target: float) -> float:
        """Train for so many steps or to a loss; return the seconds that the steps took.

        Raises:
            GateError: the loss is not reached.
        """
        problem, every = self.problem, self.problem.scale.every
        torch.manual_seed(self.seed)
        model = copy.deepcopy(problem.model)
        update, extra = self.prepare(model)
        optimizer = torch.optim.AdamW(
            [{"params": list(model.parameters()), "lr": 2e-3}, {"params": extra, "lr": 1e-2}],
            weight_decay=0.0,
        )
        batches, seconds, reached = problem.batches(self.seed), 0.0, float("nan")
        for step in range(every, most + 1, every):
            chosen = [next(batches) for _ in range(every)]
            _synchronize(problem.device)
            start = time.perf_counter()
            for batch in chosen:
                optimizer.zero_grad(set_to_none=True)
                update(model, batch)
                optimizer.step()
            _synchronize(problem.device)
            seconds += time.perf_counter() - start
            reached = problem.check(model)
            if reached <= target:
                self.steps.append(step)
                return seconds
        raise GateError(f"expected a held-out loss <= {target:.3g} within {most} steps, found {reached:.3g}")

    def candidate(self, name: str, peer: bool = False) -> Candidate:
        """Return the training; it passes its gate if the first steps lower the loss."""

        def error() -> float:
            self.train(self.problem.scale.every, self.problem.initial)
            self.steps.clear()
            return 0.0

        def notes() -> dict[str, Any]:
            return {"steps": self.steps}

        return Candidate(name, self.run, error, 0.0, peer, self.begin, notes)


def own_clock(run: Callable[[], object], repeats: int) -> float:
    """Return the seconds that a training says it took: its checks are not timed."""
    seconds = run()
    assert isinstance(seconds, float)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def benchmarks(options: Options) -> Iterator[Benchmark]:
    """Yield the cases of this group."""
    scale = options.pick(
        Scale((8, 8), 20, 1.1, 2, 40),
        Scale((16, 32), 50, 0.25, 10, 1500),
        Scale((32, 64), 125, 0.2, 20, 3000),
    )
    ways: dict[str, Role] = {
        PLAIN: "limit",
        K_BACKWARDS_PCGRAD: "reference",
        PUBLISHED_UNCERTAINTY: "reference",
        SLICES_PCGRAD: "baseline",
        AUTOJAC_PCGRAD: "peer",
        UNCERTAINTY: "ours",
        f"{OURS}, PCGrad": "ours",
        f"{OURS}, NashMTL": "ours",
    }

    def build() -> list[Candidate]:
        problem = Problem(scale, torch.device(options.device))
        found = {
            PLAIN: _plain,
            K_BACKWARDS_PCGRAD: _k_backwards,
            PUBLISHED_UNCERTAINTY: _published_uncertainty,
            SLICES_PCGRAD: _by_hand,
            AUTOJAC_PCGRAD: _torchjd,
            UNCERTAINTY: _ours(lambda: dm.UncertaintyWeighting(K)),
            f"{OURS}, PCGrad": _ours(dm.PCGrad),
            f"{OURS}, NashMTL": _ours(lambda: dm.NashMTL(update_every=1)),
        }
        peers = {name for name, role in ways.items() if role == "peer"}
        return [Training(problem, way).candidate(name, name in peers) for name, way in found.items()]

    return iter(
        [
            Benchmark(
                Group.TRAINING,
                f"digits, UNet of {scale.channels[0]} and {scale.channels[1]} channels, batch {scale.batch}, "
                f"loss {scale.target:g}",
                ways,
                build,
                options.pick(1, 2, 5),
                {"target": scale.target, "batch": scale.batch, "k": K},
                {"LibMTL": "its PCGrad is the published one"},
                clock=own_clock,
                allowance=float("inf"),
                warmup=0,
            ),
            *trainer.benchmarks(options),
        ]
    )


Prepared = tuple[Update, list[Tensor]]


def _plain(model: nn.Module) -> Prepared:
    return lambda model, batch: plain_step(model, Problem.losses, batch), []


def _k_backwards(model: nn.Module) -> Prepared:
    return lambda model, batch: pcgrad_step(model, Problem.losses, batch, random_orders(K)), []


def _published_uncertainty(model: nn.Module) -> Prepared:
    log_variances = nn.Parameter(torch.zeros(K, device=next(model.parameters()).device))
    return lambda model, batch: uw_step(model, Problem.losses, batch, log_variances), [log_variances]


def _by_hand(model: nn.Module) -> Prepared:
    """Gradients of slices, Gramian, weights, combination."""
    parameters = list(model.parameters())
    weighting = dm.PCGrad()

    def update(model: nn.Module, batch: Batch) -> None:
        case = Case("", model, batch, K, {})
        rows = [
            torch.autograd.grad(Problem.losses(model, part).mean(), parameters)
            for part in slice_batches(case)
        ]
        project_by_hand(stacked(rows), parameters, weighting.draw_order(K, parameters[0].device))

    return update, []


def _torchjd(model: nn.Module) -> Prepared:
    torchjd = require("torchjd.autojac", "bench")
    aggregator = require("torchjd.aggregation", "bench").PCGrad()
    parameters = list(model.parameters())

    def update(model: nn.Module, batch: Batch) -> None:
        losses = Problem.losses(model, batch)
        means = torch.stack([losses[batch.cluster == k].mean() / K for k in range(K)])
        torchjd.backward(means, inputs=parameters, parallel_chunk_size=1)
        torchjd.jac_to_grad(parameters, aggregator)

    return update, []


def _ours(weighting: Callable[[], Any]) -> Callable[[nn.Module], Prepared]:
    def prepare(model: nn.Module) -> Prepared:
        balance = weighting().to(next(model.parameters()).device)
        mtl = dm.ClusteredMTL(model, K, balance)

        def update(model: nn.Module, batch: Batch) -> None:
            mtl.backward(Problem.losses(mtl, batch, cluster=batch.cluster))

        return update, list(balance.parameters())

    return prepare
